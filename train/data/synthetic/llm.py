"""Asking a language model: each request with a deadline and new tries, over a connection that stays put.

Nothing here waits without an end. A try is over after `Timeouts.generation` or `.grading` whatever the server
does, also where it sends a byte a second for ever. A request has at most five tries with growing, random
waits between, and longer ones where the server asks for that (Retry-After). All requests together end at
`LLMClient.deadline`. Redirects are not followed, proxies and .netrc not read, and the name of the host is
looked up once, so that no later answer of the name server leads the requests, and the API key, elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any, Self, TypeVar

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential, wait_random

from fusedgpt.train.data.synthetic.llm_config import LLMConfig, Timeouts, check_address
from fusedgpt.train.data.synthetic.llm_protocols import (
    Answer,
    Fault,
    LLMError,
    Ollama,
    OpenAI,
    Question,
    RequestFailed,
    error_text,
    json_object,
    plain_text,
)

MOST_FAILURES = 5  # so many requests in a row fail, each after its tries, and the server counts as gone
_MAX_BODY_BYTES = 4 << 20  # an answer's text is a hundredth of its stream at most
_TRIES, _TRIES_AFTER_TIMEOUT = 5, 2
_LONGEST_WAIT = 60.0
_SECRET_CHARS = 8  # a shorter "key" is one like "none", and may be part of any text
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
_T = TypeVar("_T")


class LLMClient:
    """An open connection to the server that `config` names; use it as an async context manager.

    `note` gets a line for a person now and then; `spent` seconds are taken off the total time. On entry it
    raises LLMError where the host's name cannot be looked up, ValueError where it may not be asked.
    """

    def __init__(
        self, config: LLMConfig, note: Callable[[str], None] = lambda _: None, spent: float = 0.0
    ) -> None:
        self.config, self.note, self.spent = config, note, spent
        self.timeouts: Timeouts = config.resolve_timeouts()
        self.faults: Counter[str] = Counter()  # tries that failed, by kind
        self.parallel = config.llm_concurrency  # falls where the server cannot keep up
        self.protocol = Ollama() if config.data_source == "ollama" else OpenAI()
        self._key = config.api_key() or ""
        self._secret = self._key if len(self._key) >= _SECRET_CHARS else ""  # to be taken out of what comes
        self._reached = False
        self._listed: list[str] = []
        self._shrunk_at = self._resume_at = 0.0

    async def __aenter__(self) -> Self:
        try:
            url = httpx2.URL(self.config.origin)
        except httpx2.InvalidURL as error:
            raise ValueError(f"llm_host {self.config.origin!r} is no URL: {error}") from None
        self._addresses = _look_up(url, self.timeouts.connect)
        self._url = url.copy_with(host=self._addresses[0])
        self._extensions = {"sni_hostname": url.raw_host.decode("ascii")}
        headers = {
            "Host": url.netloc.decode("ascii"),
            "Accept-Encoding": "identity",
            "User-Agent": "fusedgpt",
        }
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(None, connect=self.timeouts.connect),
            limits=httpx2.Limits(max_connections=self.config.llm_concurrency + 1),
            follow_redirects=False,
            trust_env=False,
        )
        self.deadline = asyncio.get_running_loop().time() + self.timeouts.total - self.spent
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def until_deadline(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work. Raises LLMError where it is not done when all time is over."""
        try:
            async with asyncio.timeout_at(self.deadline):
                await work
        except TimeoutError:
            raise LLMError(f"the time is over (--timeout-total {self.timeouts.total:g} seconds)") from None

    async def check_models(self, **wanted: str | None) -> None:
        """Raises LLMError unless the server answers and has the models wanted, as far as it says.

        wanted: models by the option that names them, e.g. gen_model="llama3.2".
        """
        self._listed = await self._installed()
        known = {name.removesuffix(":latest") for name in self._listed}
        for option, model in wanted.items():
            flag = f"--{option.replace('_', '-')}"
            if not model:
                raise LLMError(f"{flag} is needed; {self.config.origin} has {self._listing()}")
            if self.config.data_source == "ollama" and model.removesuffix(":latest") not in known:
                remedy = f"get it with `ollama pull {model}` or choose another {flag}"
                raise LLMError(
                    f"{self.config.origin} has no model {model!r}; it has {self._listing()}; {remedy}"
                )

    def _listing(self) -> str:
        return ", ".join(sorted(self._listed)[:20]) or "none that it lists"

    async def _installed(self) -> list[str]:
        """The server's models. Some OpenAI-compatible servers will not say: [] where it is there at least."""
        failure = RequestFailed("it has no address")
        for address in self._addresses:  # localhost may be ::1 first, where few servers listen
            self._url = self._url.copy_with(host=address)
            try:
                tries = _TRIES if self.config.data_source == "ollama" else 1
                return await self._retry(self._list_models, tries)
            except LLMError as error:
                if self._reached and self.config.data_source == "openai":
                    return []
                if not isinstance(error, RequestFailed):
                    raise
                failure = error
            if self._reached:
                break
        raise LLMError(self._down(failure))

    async def _list_models(self) -> list[str]:
        path = self.protocol.models_path
        seconds = self.timeouts.connect + self.timeouts.grading
        data = json_object(await self._try("GET", path, None, seconds, _whole))
        try:
            return [plain_text(name)[:200] for name in self.protocol.models(data)[:1000]]
        except (KeyError, TypeError):
            raise Fault("bad JSON", f"its answer to {path} is no list of models") from None

    def _down(self, failure: Exception) -> str:
        start = "it, for example with `transformers serve MODEL_FOLDER`,"
        if self.config.data_source == "ollama":
            start = "it with `ollama serve`"
            start += "" if shutil.which("ollama") else " (ollama.com/download has it)"
        return (
            f"no {self.protocol.name} server answers at {self.config.origin}: {failure}; start {start} "
            "or give its address with --llm-host, or do without: --data-source template"
        )

    async def ask(self, question: Question) -> Answer:
        """The model's answer. Raises RequestFailed where all tries failed, LLMError where more are no use."""
        path, body = self.protocol.request(question, self.config)

        async def attempt() -> Answer:
            return await self._try("POST", path, body, question.seconds, self._read_answer)

        return await self._retry(attempt, _TRIES)

    async def _retry(self, attempt: Callable[[], Coroutine[Any, Any, _T]], tries: int) -> _T:
        """What `attempt` returns, at the latest in the try of that number."""

        def enough(state: RetryCallState) -> bool:
            fault = state.outcome.exception() if state.outcome else None
            kind = getattr(fault, "kind", "")
            never = kind == "no connection" and not self._reached
            limit = 1 if never else _TRIES_AFTER_TIMEOUT if kind == "timeout" else tries
            return state.attempt_number >= limit

        pause = self.timeouts.interval
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Fault),
            wait=wait_exponential(multiplier=pause, max=_LONGEST_WAIT) + wait_random(0, pause),
            stop=enough,
            reraise=True,
        )
        try:
            return await retrying(attempt)
        except Fault as fault:
            raise RequestFailed(str(fault)) from None

    async def _try(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        seconds: float,
        read: Callable[[AsyncIterator[bytes]], Coroutine[Any, Any, _T]],
    ) -> _T:
        """One request, over after `seconds`. Raises Fault, counted, or LLMError where it is no use."""
        await self._wait_as_asked()
        started = time.monotonic()
        url = self._url.copy_with(path=self._url.path.rstrip("/") + path)
        try:
            async with asyncio.timeout(seconds):
                async with self._http.stream(method, url, json=body, extensions=self._extensions) as response:
                    self._reached = True
                    await self._check(response, path)
                    return await read(self._lines(response))
        except TimeoutError:
            self._reached = True  # connecting has a timeout of its own
            self._shrink(started)
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
        """Raises unless the status is 200: Fault where that may pass, else LLMError."""
        status = response.status_code
        if status == 200:
            return
        where = self.config.origin + path
        if 300 <= status < 400:
            to = self._safe(response.headers.get("location", ""))
            raise LLMError(
                f"{where} redirects to {to!r}, which is not followed; give the address as --llm-host"
            )
        said = self._safe(error_text(_json_or_none(await _whole(self._lines(response)))))
        if status in _PASSING_STATUS:
            self._hold_back(response.headers.get("retry-after"))
            raise Fault(str(status), f"{where} answers {status} {said!r}")
        if status in (401, 403):
            raise LLMError(
                f"{where} refuses access ({status} {said!r}); --llm-api-key-env names the key's variable"
            )
        if status == 404:
            hint = f"is that an {self.protocol.name} server, and the address right?"
            hint = f"the server has the models {self._listing()}" if self._listed else hint
            raise LLMError(f"{where} is not there (404 {said!r}); {hint}")
        raise LLMError(f"{where} answers {status} {said!r}")

    def _safe(self, text: object) -> str:
        """What a server or a library says, fit to be shown."""
        shown = " ".join(plain_text(str(text)).split())
        return (shown.replace(self._secret, "[the API key]") if self._secret else shown)[:300]

    def _hold_back(self, retry_after: str | None) -> None:
        """Let no request begin before the time that the server asks for."""
        seconds = _seconds_to_wait(retry_after)
        if seconds > 0:
            self.faults["told to wait"] += 1
            self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + seconds)

    async def _wait_as_asked(self) -> None:
        loop = asyncio.get_running_loop()
        while (seconds := self._resume_at - loop.time()) > 0:
            if self._resume_at >= self.deadline:
                raise LLMError(
                    f"{self.config.origin} asks to wait {seconds:,.0f} s, past the end of "
                    f"--timeout-total {self.timeouts.total:g}; run the same command again later"
                )
            await asyncio.sleep(seconds)

    def _shrink(self, started: float) -> None:
        """Fewer requests at once: a server that works on one at a time lets the others wait too long."""
        if self.parallel > 1 and started > self._shrunk_at:
            self.parallel //= 2
            self._shrunk_at = time.monotonic()
            self.note(f"the server is slow to answer: from now on {self.parallel} request(s) at a time")

    async def _read_answer(self, lines: AsyncIterator[bytes]) -> Answer:
        """The text of a stream. Raises Fault for one that breaks off."""
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

    async def _lines(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        """The body in lines, without the key. Raises Fault where it grows too big."""
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


async def _whole(lines: AsyncIterator[bytes]) -> bytes:
    return b"\n".join([line async for line in lines])


def _json_or_none(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _seconds_to_wait(retry_after: str | None) -> float:
    """Retry-After: a number of seconds or an HTTP date; 0 for what is neither."""
    text = (retry_after or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return 0.0


def _look_up(url: httpx2.URL, seconds: float) -> list[str]:
    """The host's addresses, once and for all. Raises ValueError where one of them may not be asked."""
    host, found = url.host, list[str]()
    why = "no answer from the name server"

    def ask() -> None:
        nonlocal why
        try:
            rows = socket.getaddrinfo(host, url.port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(row[4][0]) for row in rows))
        except (OSError, UnicodeError) as error:
            why = str(error)

    thread = threading.Thread(target=ask, daemon=True)  # getaddrinfo knows no deadline
    thread.start()
    thread.join(seconds)
    if not found:
        raise LLMError(f"the host {host!r} of --llm-host cannot be found ({why})")
    for address in found:
        check_address(address)
    return found


def gave_out(failures: int, last: RequestFailed) -> LLMError:
    """What to raise where so many requests in a row failed."""
    remedy = "see the server's log, or try again later"
    return LLMError(f"{failures} requests in a row failed, the last: {last}; {remedy}")


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """asyncio.run, also where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


async def run_until(done: Callable[[], bool], work: list[Coroutine[Any, Any, None]]) -> None:
    """Run all at once until each has returned or one returns when all is `done`; what goes on is cancelled.

    Raises what the first to fail raises.
    """
    tasks = {asyncio.create_task(one) for one in work}
    pending = tasks
    try:
        while pending and not done():
            finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
