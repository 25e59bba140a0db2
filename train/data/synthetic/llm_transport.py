"""HTTP to one server within limits, for the `openai` client.

The host's name is looked up once, so that a later DNS answer cannot lead the requests, and the API key,
elsewhere. The client's own headers, which it may take from the environment, are not sent. A body is read up
to a limit and never decompressed.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

import httpx2

from fusedgpt.kernels.errors import InputError
from fusedgpt.train.data.synthetic.llm_answer import Fault, LLMError
from fusedgpt.train.data.synthetic.llm_config import LLMConfig, check_address, is_loopback

_MAX_BODY_BYTES = 4 << 20


class Transport(httpx2.AsyncBaseTransport):
    """Sends to the server that `config` names; `reached`: it was there once.

    Raises LLMError if its name is not found within `seconds`, ValueError if it must not be contacted.
    """

    def __init__(self, config: LLMConfig, seconds: float) -> None:
        try:
            url = httpx2.URL(config.origin)
        except httpx2.InvalidURL as error:
            raise InputError(f"llm_host {config.origin!r} is not a URL: {error}") from None
        self.addresses, self.reached = look_up(url, seconds), False
        self._headers = {"Host": url.netloc.decode("ascii"), "User-Agent": "fusedgpt"}
        self._headers |= {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        self._extensions = {"sni_hostname": url.raw_host.decode("ascii")}  # whose certificate is asked for
        if key := config.api_key():
            readable = url.scheme == "http" and not all(map(is_loopback, self.addresses))
            if readable and not config.llm_allow_http:
                seen = f"{config.origin} would get the API key unencrypted"
                raise InputError(f"{seen}: use https, or allow it with --llm-allow-http")
            self._headers["Authorization"] = f"Bearer {key}"
        limits = httpx2.Limits(max_connections=config.llm_concurrency + 1)
        self._http = httpx2.AsyncHTTPTransport(trust_env=False, limits=limits)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """The whole answer. Raises Fault if it is too big, httpx2.HTTPError if there is none."""
        response = await self._connect(request)
        self.reached = True
        body = bytearray()
        try:
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > _MAX_BODY_BYTES:
                    raise Fault("too big", f"the answer is bigger than {_MAX_BODY_BYTES >> 20} MiB")
        finally:
            await response.aclose()
        read = (name for name in ("location", "retry-after") if name in response.headers)
        headers = {"content-type": "application/json", **{name: response.headers[name] for name in read}}
        return httpx2.Response(response.status_code, headers=headers, content=bytes(body))

    async def _connect(self, request: httpx2.Request) -> httpx2.Response:
        addresses = self.addresses
        for address in addresses:  # localhost may be ::1 first, where few servers listen
            url = request.url.copy_with(host=address)
            extensions = request.extensions | self._extensions
            sent = httpx2.Request(
                request.method, url, headers=self._headers, content=request.content, extensions=extensions
            )
            try:
                response = await self._http.handle_async_request(sent)
                break
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if address == addresses[-1]:
                    raise
        self.addresses = [address]
        return response

    async def aclose(self) -> None:
        await self._http.aclose()


def look_up(url: httpx2.URL, seconds: float) -> list[str]:
    """The addresses of the host. Raises ValueError if one of them must not be contacted."""
    found: list[str] = []

    def ask() -> None:
        with suppress(OSError, UnicodeError):
            rows = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(row[4][0]) for row in rows))

    thread = threading.Thread(target=ask, daemon=True)  # getaddrinfo has no timeout
    thread.start()
    thread.join(seconds)
    if not found:
        raise LLMError(f"the host {url.host!r} of --llm-host cannot be found")
    for address in found:
        check_address(address)
    return found
