"""Requests to a language model, with deadlines and retries, over a connection to one fixed address.

Nothing here waits without a limit. An attempt ends after `Timeouts.generation` or `.grading` seconds whatever
the server does, even if it sends a byte per second for ever. A request has at most five attempts with
exponential, jittered pauses, and longer ones if the server asks for them (Retry-After). All requests together
end at `LLMClient.deadline`. Redirects are not followed, proxies and .netrc not used, and the host's name is
resolved once, so that a later DNS answer cannot lead the requests, and the API key, elsewhere.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential, wait_random

from fusedgpt.kernels.errors import InputError
from fusedgpt.train.data.synthetic.llm_config import LLMConfig, check_address, is_loopback
from fusedgpt.train.data.synthetic.llm_protocols import (
    DISPENSABLE,
    Answer,
    Fault,
    LLMError,
    Ollama,
    OpenAI,
    RequestFailed,
    RequestRefused,
    error_text,
    json_object,
    plain_text,
)

_MAX_FAILURES = 5  # failed requests in a row, each after its attempts, until the server is given up
_MAX_BODY_BYTES = 4 << 20  # the text of an answer is at most a hundredth of its stream
_ATTEMPTS, _ATTEMPTS_AFTER_TIMEOUT = 5, 2
_MAX_PAUSE = 60.0  # seconds
_SECRET_CHARS = 8  # a shorter "key", such as "none", may be part of any text
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_Lines = AsyncIterator[bytes]
_T = TypeVar("_T")


def use_server(
    config: LLMConfig,
    work: Callable[[LLMClient], Coroutine[Any, Any, None]],
    models: Mapping[str, str | None],
    note: Callable[[str], object],
    spent: float = 0.0,
) -> None:
    """Do `work` with a client of the server that `config` names, which must have the models.

    models: by the option that names them, such as {"gen_model": "llama3.2"}. note: gets messages for the
    user. spent: seconds to subtract from --timeout-total. Raises LLMError if the server fails or the time is
    over, ValueError for an address that must not be contacted.
    """

    async def main() -> None:
        client = LLMClient(config, note, spent)
        async with client.http:
            try:
                async with asyncio.timeout_at(client.deadline):
                    await client.check_models(models)
                    await work(client)
            except TimeoutError:
                limit = f"--timeout-total {client.timeouts.total:g} seconds"
                raise LLMError(f"the time is over ({limit})") from None

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(main())
    else:  # in a notebook
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, main()).result()


class LLMClient:
    """Sends requests to the server that `config` names, over `http`; made in a running loop by use_server."""

    def __init__(self, config: LLMConfig, note: Callable[[str], object], spent: float = 0.0) -> None:
        self.config, self.note = config, note
        self.timeouts = config.resolve_timeouts()
        self.faults: Counter[str] = Counter()  # failed attempts by kind
        self.parallel = config.llm_concurrency  # lowered if the server cannot keep up
        self.protocol = Ollama() if config.data_source == "ollama" else OpenAI()
        self._reached = False
        self._models: list[str] = []
        self._renamed: dict[str, str] = {}  # the refused ones of DISPENSABLE
        self._shrunk_at = self._resume_at = 0.0
        key = config.api_key() or ""
        self._secret = key if len(key) >= _SECRET_CHARS else ""  # removed from all that comes in
        try:
            url = httpx2.URL(config.origin)
        except httpx2.InvalidURL as error:
            raise InputError(f"llm_host {config.origin!r} is not a URL: {error}") from None
        self._addresses = _look_up(url, self.timeouts.connect)
        readable = key and url.scheme == "http" and not all(map(is_loopback, self._addresses))
        if readable and not config.llm_allow_http:
            seen = f"{config.origin} would get the API key unencrypted"
            raise InputError(f"{seen}: use https, or allow it with --llm-allow-http")
        self._url = url.copy_with(host=self._addresses[0])
        self._extensions = {"sni_hostname": url.raw_host.decode("ascii")}
        headers = {
            "Host": url.netloc.decode("ascii"),
            "Accept-Encoding": "identity",
            "User-Agent": "fusedgpt",
        }
        self.http = httpx2.AsyncClient(
            headers=headers | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx2.Timeout(None, connect=self.timeouts.connect),
            limits=httpx2.Limits(max_connections=config.llm_concurrency + 1),
            follow_redirects=False,
            trust_env=False,
        )
        self.deadline = asyncio.get_running_loop().time() + self.timeouts.total - spent

    async def check_models(self, wanted: Mapping[str, str | None]) -> None:
        """Raises LLMError unless the server answers and, if it lists its models, has those wanted."""
        self._models = await self._list_models()
        known = {name.removesuffix(":latest") for name in self._models}
        for option, model in wanted.items():
            flag = f"--{option.replace('_', '-')}"
            if not model:
                raise LLMError(f"{flag} is needed; {self.config.origin} has {self._listing()}")
            if self.config.data_source == "ollama" and model.removesuffix(":latest") not in known:
                found = f"{self.config.origin} has no model {model!r}; it has {self._listing()}"
                raise LLMError(f"{found}; get it with `ollama pull {model}` or choose another {flag}")

    def _listing(self) -> str:
        return ", ".join(sorted(self._models)[:20]) or "none that it lists"

    async def _list_models(self) -> list[str]:
        """The server's models, [] if it answers but does not list them, as some OpenAI-compatible ones do."""
        path, models, name = self.protocol.model_list
        seconds = self.timeouts.connect + self.timeouts.grading
        is_ollama = self.config.data_source == "ollama"

        async def read(lines: _Lines) -> list[str]:
            data = json_object(await _join(lines))
            try:
                return [plain_text(str(model[name]))[:200] for model in data[models][:1000]]
            except (KeyError, TypeError):
                raise Fault("bad JSON", f"its answer to {path} is not a list of models") from None

        failure = ""
        for address in self._addresses:  # localhost may be ::1 first, where few servers listen
            self._url = self._url.copy_with(host=address)
            try:
                attempt = partial(self._attempt, path, None, seconds, read)
                return await self._retry(attempt, _ATTEMPTS if is_ollama else 1)
            except LLMError as error:
                if self._reached and not is_ollama:
                    return []
                if not isinstance(error, RequestFailed):
                    raise
                failure = str(error)
            if self._reached:
                break
        start = "it, for example with `transformers serve MODEL_FOLDER`,"
        if is_ollama:
            installed = "" if shutil.which("ollama") else " (ollama.com/download has it)"
            start = f"it with `ollama serve`{installed}"
        raise LLMError(
            f"no {self.protocol.name} server answers at {self.config.origin}: {failure}; start {start} "
            "or give its address with --llm-host, or do without: --data-source template"
        )

    async def run_jobs(
        self, jobs: Iterator[Coroutine[Any, Any, None]], done: Callable[[], bool] = lambda: False
    ) -> None:
        """Run `jobs`, `parallel` at a time, until all have ended or `done`, which cancels the others.

        Raises the first exception of a job. Of RequestFailed, five in a row raise LLMError.
        """
        running: set[asyncio.Task[None]] = set()
        failed = 0
        try:
            while not done():
                while len(running) < self.parallel and (job := next(jobs, None)):
                    running.add(asyncio.create_task(job))
                if not running:
                    return
                finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for error in [task.exception() for task in finished]:
                    if error is not None and not isinstance(error, RequestFailed):
                        raise error
                    failed = failed + 1 if error else 0
                    if failed >= _MAX_FAILURES:
                        remedy = "see the server's log, or try again later"
                        raise LLMError(f"{failed} requests in a row failed, the last: {error}; {remedy}")
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def ask(
        self, model: str, prompt: str, seconds: float, *, seed: int, max_tokens: int, temperature: float = 0.9
    ) -> Answer:
        """The model's answer; each attempt has `seconds`.

        Raises RequestFailed if all attempts failed, LLMError if retrying is no use.
        """
        path, body = self.protocol.request(self.config, model, prompt, seed, max_tokens, temperature)
        while True:
            names = {name: self._renamed.get(name, name) for name in body}
            sent = {new: body[name] for name, new in names.items() if new}
            try:
                return await self._retry(
                    partial(self._attempt, path, sent, seconds, self._read_answer), _ATTEMPTS
                )
            except RequestRefused as error:
                refused = next(
                    (n for n in DISPENSABLE if n in sent and re.search(rf"\b{n}\b", str(error))), None
                )
                if refused is None:
                    raise
                if refused not in self._renamed:  # by another request that was in flight
                    new = self._renamed[refused] = DISPENSABLE[refused]
                    instead = f"named {new}" if new else "left out"
                    self.note(f"the server refuses {refused}, which is {instead} from now on: {error}")

    async def _retry(self, attempt: Callable[[], Coroutine[Any, Any, _T]], attempts: int) -> _T:
        """The result of `attempt`, which is called up to that many times."""

        def enough(state: RetryCallState) -> bool:
            kind = getattr(state.outcome and state.outcome.exception(), "kind", "")
            never = kind == "no connection" and not self._reached
            limit = 1 if never else _ATTEMPTS_AFTER_TIMEOUT if kind == "timeout" else attempts
            return state.attempt_number >= limit

        pause = self.timeouts.interval
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Fault),
            wait=wait_exponential(multiplier=pause, max=_MAX_PAUSE) + wait_random(0, pause),
            stop=enough,
            reraise=True,
        )
        try:
            return await retrying(attempt)
        except Fault as fault:
            raise RequestFailed(str(fault)) from None

    async def _attempt(
        self,
        path: str,
        body: dict[str, Any] | None,
        seconds: float,
        read: Callable[[_Lines], Coroutine[Any, Any, _T]],
    ) -> _T:
        """One HTTP request of at most `seconds`. Raises Fault, counted, or LLMError if retrying is no use."""
        await self._wait_as_asked()
        started = time.monotonic()
        method = "POST" if body else "GET"
        url = self._url.copy_with(path=self._url.path.rstrip("/") + path)
        try:
            async with asyncio.timeout(seconds):
                async with self.http.stream(method, url, json=body, extensions=self._extensions) as response:
                    self._reached = True
                    await self._check(response, path)
                    return await read(self._lines(response))
        except TimeoutError:
            self._reached = True  # connecting has a timeout of its own
            if self.parallel > 1 and started > self._shrunk_at:  # perhaps it works on one at a time
                self.parallel //= 2
                self._shrunk_at = time.monotonic()
                self.note(f"the server is slow to answer: from now on {self.parallel} request(s) at a time")
            longer = "--timeout-generation, --timeout-grading"
            fault = Fault("timeout", f"no whole answer within {seconds:g} s (for longer: {longer})")
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            fault = Fault("no connection", self._safe(error))
        except httpx2.HTTPError as error:
            fault = Fault("cut", f"the connection broke: {self._safe(error)}")
        except Fault as error:
            fault = Fault(error.kind, self._safe(error))
        self.faults[fault.kind] += 1
        raise fault

    async def _check(self, response: httpx2.Response, path: str) -> None:
        """Raises unless the status is 200: Fault if it is transient, else LLMError."""
        status = response.status_code
        if status == 200:
            return
        where = self.config.origin + path
        if 300 <= status < 400:
            to = self._safe(response.headers.get("location", ""))
            hint = "which is not followed; give the address as --llm-host"
            raise LLMError(f"{where} redirects to {to!r}, {hint}")
        said = self._safe(error_text(await _join(self._lines(response))))
        if status in _TRANSIENT_STATUS:
            if (seconds := _seconds_to_wait(response.headers.get("retry-after"))) > 0:
                self.faults["told to wait"] += 1
                self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + seconds)
            raise Fault(str(status), f"{where} answers {status} {said!r}")
        if status in (401, 403):
            hint = "--llm-api-key-env names the key's variable"
            raise LLMError(f"{where} refuses access ({status} {said!r}); {hint}")
        if status == 404:
            hint = f"is that an {self.protocol.name} server, and the address right?"
            hint = f"the server has the models {self._listing()}" if self._models else hint
            raise LLMError(f"{where} is not there (404 {said!r}); {hint}")
        raise RequestRefused(f"{where} answers {status} {said!r}")

    def _safe(self, text: object) -> str:
        """A message of the server or a library, fit to be shown."""
        shown = " ".join(plain_text(str(text)).split())
        return (shown.replace(self._secret, "[the API key]") if self._secret else shown)[:300]

    async def _wait_as_asked(self) -> None:
        """Wait until the time that a Retry-After named. Raises LLMError if that is past the deadline."""
        loop = asyncio.get_running_loop()
        while (seconds := self._resume_at - loop.time()) > 0:
            if self._resume_at >= self.deadline:
                end = f"the end of --timeout-total {self.timeouts.total:g}; run the same command again later"
                raise LLMError(f"{self.config.origin} asks to wait {seconds:,.0f} s, past {end}")
            await asyncio.sleep(seconds)

    async def _read_answer(self, lines: _Lines) -> Answer:
        """The text of a streamed answer. Raises Fault if it breaks off."""
        texts: list[str] = []
        end: str | None = None
        async for line in lines:
            if line.strip():
                piece = self.protocol.piece(line.rstrip(b"\r"))
                texts.append(piece.text)
                end = end or piece.end
        if end is None:
            raise Fault("cut", "the answer broke off")
        return Answer("".join(texts).replace(self._secret, ""), end != "length")  # two lines may share it

    async def _lines(self, response: httpx2.Response) -> _Lines:
        """The lines of the body, without the key. Raises Fault if it is too big."""
        secret = self._secret.encode()
        size, rest = 0, b""
        async for chunk in response.aiter_raw():
            size += len(chunk)
            if size > _MAX_BODY_BYTES:
                raise Fault("too big", f"the answer is bigger than {_MAX_BODY_BYTES >> 20} MiB")
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line.replace(secret, b"")
        if rest:
            yield rest.replace(secret, b"")


async def _join(lines: _Lines) -> bytes:
    return b"\n".join([line async for line in lines])


def _seconds_to_wait(retry_after: str | None) -> float:
    """Retry-After: a number of seconds or an HTTP date; 0 for anything else."""
    text = (retry_after or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return 0.0


def _look_up(url: httpx2.URL, seconds: float) -> list[str]:
    """The addresses of the host. Raises ValueError if one of them must not be contacted."""
    host, found = url.host, list[str]()
    why = "no answer from the name server"

    def ask() -> None:
        nonlocal why
        try:
            rows = socket.getaddrinfo(host, url.port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(row[4][0]) for row in rows))
        except (OSError, UnicodeError) as error:
            why = str(error)

    thread = threading.Thread(target=ask, daemon=True)  # getaddrinfo has no timeout
    thread.start()
    thread.join(seconds)
    if not found:
        raise LLMError(f"the host {host!r} of --llm-host cannot be found ({why})")
    for address in found:
        check_address(address)
    return found
