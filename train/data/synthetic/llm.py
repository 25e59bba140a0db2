"""Requests to a language model by the `openai` client, which Ollama, llama.cpp, vLLM and others answer too.

Nothing here waits without a limit. An attempt ends after `Timeouts.generation` or `.grading` seconds whatever
the server does. A request has at most five attempts with exponential, jittered pauses, and longer ones if the
server asks for them (Retry-After). All requests together end at `LLMClient.deadline`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar

import httpx2
from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential, wait_random

from fusedgpt.train.data.synthetic.jsonl import parse_json
from fusedgpt.train.data.synthetic.llm_answer import (
    Answer,
    Fault,
    LLMError,
    RequestFailed,
    RequestRefused,
    plain_text,
    strip_thoughts,
    thinks_aloud,
)
from fusedgpt.train.data.synthetic.llm_config import LLMConfig
from fusedgpt.train.data.synthetic.llm_transport import Transport

_MAX_FAILURES = 5  # failed requests in a row, each after its attempts, until the server is given up
_ATTEMPTS, _ATTEMPTS_AFTER_TIMEOUT = 5, 2
_MAX_PAUSE = 60.0  # seconds
_SECRET_CHARS = 8  # a shorter "key", such as "none", may be part of any text
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_THOUGHT_TOKENS = 4096  # that an answer may have in addition, of a model that thinks first
# What a request can do without: the word in a refusal, and by what name some servers take it instead.
_DISPENSABLE = {
    "seed": (r"seed", ""),
    "temperature": (r"temperature", ""),
    "reasoning_effort": (r"reasoning\w*|think\w*", ""),
    "chat_template_kwargs": (r"chat_template_kwargs", ""),
    "max_tokens": (r"max_tokens", "max_completion_tokens"),
}
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
        try:
            async with client.api, asyncio.timeout_at(client.deadline):
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


def installed_models(config: LLMConfig | None = None) -> list[str]:
    """The models that a server lists, by default Ollama on this machine. Errors are use_server's."""
    found: list[str] = []

    async def look(client: LLMClient) -> None:
        found.extend(sorted(client.models))

    config = config or LLMConfig(data_source="ollama", timeout_total=3.0)
    use_server(config, look, {}, lambda _: None)
    return found


class LLMClient:
    """Sends requests to the server that `config` names, by `api`; made in a running loop by use_server."""

    def __init__(self, config: LLMConfig, note: Callable[[str], object], spent: float = 0.0) -> None:
        self.config, self.note = config, note
        self.timeouts = config.resolve_timeouts()
        self.faults: Counter[str] = Counter()  # failed attempts by kind
        self.parallel = config.llm_concurrency  # lowered if the server cannot keep up
        self._is_ollama = config.data_source == "ollama"
        self._thinks = False  # the model does, even if asked not to, before it answers
        self.models: list[str] = []
        self._renamed: dict[str, str] = {}  # the refused ones of _DISPENSABLE
        self._shrunk_at = self._resume_at = 0.0
        key = config.api_key() or ""
        self._secret = key if len(key) >= _SECRET_CHARS else ""  # removed from all that comes in
        self._transport = Transport(config, self.timeouts.connect)
        self.api = AsyncOpenAI(
            base_url=f"{config.origin}/v1",
            api_key="none",  # the transport has it
            max_retries=0,
            timeout=httpx2.Timeout(None, connect=self.timeouts.connect),
            http_client=httpx2.AsyncClient(transport=self._transport),
        )
        self.deadline = asyncio.get_running_loop().time() + self.timeouts.total - spent

    async def check_models(self, wanted: Mapping[str, str | None]) -> None:
        """Raises LLMError unless the server answers and, if it is Ollama, has the models wanted."""
        seconds = self.timeouts.connect * len(self._transport.addresses) + self.timeouts.grading
        try:
            attempts = _ATTEMPTS if self._is_ollama else 1
            self.models = await self._retry(partial(self._attempt, seconds, self._list_models), attempts)
        except LLMError as error:
            if isinstance(error, RequestFailed) and (self._is_ollama or not self._transport.reached):
                start = "ollama serve" if self._is_ollama else "transformers serve MODEL_FOLDER"
                nobody = f"no {self._kind} server answers at {self.config.origin}: {error}"
                remedy = f"start it with `{start}`, or give its address with --llm-host, or do without"
                raise LLMError(f"{nobody}; {remedy}: --data-source template") from None
            if self._is_ollama:  # others need not list their models
                raise
        known = {name.removesuffix(":latest") for name in self.models}
        for option, model in wanted.items():
            flag = f"--{option.replace('_', '-')}"
            if not model:
                raise LLMError(f"{flag} is needed; {self.config.origin} has {self._listing()}")
            if self._is_ollama and model.removesuffix(":latest") not in known:
                found = f"{self.config.origin} has no model {model!r}; it has {self._listing()}"
                raise LLMError(f"{found}; get it with `ollama pull {model}` or choose another {flag}")

    async def _list_models(self) -> list[str]:
        try:  # the client does not check what it reads
            page = await self.api.models.list()
            return [self._safe(model.id) for model in page.data[:1000] if model.id]
        except (AttributeError, TypeError):
            raise Fault("bad JSON", "what it lists as its models is no list of models") from None

    def _listing(self) -> str:
        return ", ".join(sorted(self.models)[:20]) or "none that it lists"

    @property
    def _kind(self) -> str:
        return "Ollama" if self._is_ollama else "OpenAI-compatible"

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

        A model that answers with thoughts alone is asked again with room for them, now and from then on.
        Raises RequestFailed if all attempts failed, LLMError if retrying is no use.
        """
        options: dict[str, object] = {"seed": seed, "temperature": temperature}
        while True:
            thinks = self._thinks
            if thinks:
                options |= {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}
            elif self._is_ollama:
                options |= {"reasoning_effort": "none"}
            options["max_tokens"] = max_tokens + _THOUGHT_TOKENS * thinks
            names = {name: self._renamed.get(name, name) for name in options}
            sent = {new: options[name] for name, new in names.items() if new}
            try:
                complete = partial(self._complete, model, prompt, sent)
                answer = await self._retry(partial(self._attempt, seconds, complete), _ATTEMPTS)
            except RequestRefused as error:
                self._do_without(sent, error)
                continue
            if thinks or not answer.thoughts:
                return answer
            if not self._thinks:
                self._thinks = True
                less = f"it is asked to think less, and may write {_THOUGHT_TOKENS:,} tokens more"
                self.note(f"{model} answers with thoughts alone: from now on {less}")

    def _do_without(self, sent: Mapping[str, object], error: RequestRefused) -> None:
        """Leave out, from now on, what the server refuses. Raises the error if that is needed."""
        for name, (word, new) in _DISPENSABLE.items():
            if name in sent and re.search(rf"\b(?:{word})\b", str(error)):
                if name not in self._renamed:  # by another request that was in flight
                    self._renamed[name] = new
                    instead = f"named {new}" if new else "left out"
                    self.note(f"the server refuses {name}, which is {instead} from now on: {error}")
                return
        raise error

    async def _complete(self, model: str, prompt: str, options: Mapping[str, object]) -> Answer:
        """One request. Raises Fault for what is no answer."""
        if self.config.llm_endpoint == "chat":
            messages: Any = [{"role": "user", "content": prompt}]
            made: Any = await self.api.chat.completions.create(
                model=model, messages=messages, extra_body=options
            )
        else:
            made = await self.api.completions.create(model=model, prompt=prompt, extra_body=options)
        try:
            choice = made.choices[0]
            message = getattr(choice, "message", choice)
            text = choice.text if message is choice else message.content
        except (AttributeError, LookupError, TypeError):
            if reason := getattr(made, "error", None) or getattr(made, "message", None):
                raise Fault("server error", f"the server says {self._safe(_reason(reason))!r}") from None
            raise Fault("bad JSON", f"expected an answer, found {self._safe(made)[:60]!r}") from None
        if not isinstance(text, str | None):
            raise Fault("bad JSON", f"expected text, found {self._safe(text)[:60]!r}")
        text = (text or "").replace(self._secret, "")
        ended = choice.finish_reason != "length"
        visible = strip_thoughts(text).strip()
        apart = getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None)
        cut = not ended and (not visible or thinks_aloud(visible))
        return Answer(text, ended, cut or bool(not visible and (text.strip() or apart)))

    async def _retry(self, attempt: Callable[[], Coroutine[Any, Any, _T]], attempts: int) -> _T:
        """The result of `attempt`, which is called up to that many times."""

        def enough(state: RetryCallState) -> bool:
            kind = getattr(state.outcome and state.outcome.exception(), "kind", "")
            never = kind == "no connection" and not self._transport.reached
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

    async def _attempt(self, seconds: float, request: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """One request of at most `seconds`. Raises Fault, counted, or LLMError if retrying is no use."""
        await self._wait_as_asked()
        started = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                return await request()
        except TimeoutError:
            self._transport.reached = True  # connecting has a timeout of its own
            if self.parallel > 1 and started > self._shrunk_at:  # perhaps it works on one at a time
                self.parallel //= 2
                self._shrunk_at = time.monotonic()
                self.note(f"the server is slow to answer: from now on {self.parallel} request(s) at a time")
            longer = "--timeout-generation, --timeout-grading"
            fault = Fault("timeout", f"no whole answer within {seconds:g} s (for longer: {longer})")
        except APIStatusError as error:
            fault = self._fault_of(error)
        except APIConnectionError as error:
            if isinstance(error.__cause__, (httpx2.ConnectError, httpx2.ConnectTimeout)):
                fault = Fault("no connection", self._safe(error.__cause__))
            else:
                fault = Fault("cut", f"the connection broke: {self._safe(error.__cause__)}")
        except Fault as error:
            fault = Fault(error.kind, self._safe(error))
        except (APIError, ValueError, RecursionError) as error:
            found = self._safe(str(getattr(error, "doc", error))[:1000])
            fault = Fault("bad JSON", f"expected an answer, found {found[:60]!r}")
        self.faults[fault.kind] += 1
        raise fault

    def _fault_of(self, error: APIStatusError) -> Fault:
        """The fault of a transient status; raises LLMError for any other."""
        status, where = error.status_code, error.request.url
        if 300 <= status < 400:
            to = self._safe(error.response.headers.get("location", ""))
            hint = "which is not followed; give the address as --llm-host"
            raise LLMError(f"{where} redirects to {to!r}, {hint}")
        content = error.response.content
        said = self._safe(_reason(parse_json(content) or content.decode(errors="replace")))
        if status in _TRANSIENT_STATUS:
            if (seconds := _seconds_to_wait(error.response.headers.get("retry-after"))) > 0:
                self.faults["told to wait"] += 1
                self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + seconds)
            return Fault(str(status), f"{where} answers {status} {said!r}")
        if status in (401, 403):
            hint = "--llm-api-key-env names the key's variable"
            raise LLMError(f"{where} refuses access ({status} {said!r}); {hint}")
        if status == 404:
            hint = f"is that an {self._kind} server, and the address right?"
            hint = f"the server has the models {self._listing()}" if self.models else hint
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


def _reason(body: object) -> str:
    """The reason in the body of an error of OpenAI, Ollama, vLLM or FastAPI, or all of the body."""
    while isinstance(body, dict):
        reasons = [body.get(key) for key in ("error", "message", "detail")]
        body = next((reason for reason in reasons if reason and reason is not True), str(body))
    return str(body)


def _seconds_to_wait(retry_after: str | None) -> float:
    """Retry-After: a number of seconds or an HTTP date; 0 for anything else."""
    text = (retry_after or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return 0.0
