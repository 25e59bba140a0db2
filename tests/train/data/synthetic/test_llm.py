"""The client: what it sends, when it tries again, what it refuses, and that it ends."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpcore2
import httpx2
import pytest
from ollama_fake import Fake

from fusedgpt.train.data.synthetic import llm, llm_transport
from fusedgpt.train.data.synthetic.llm import LLMClient, use_server
from fusedgpt.train.data.synthetic.llm_answer import (
    Answer,
    LLMError,
    RequestFailed,
    plain_text,
    strip_thoughts,
)
from fusedgpt.train.data.synthetic.llm_config import LLMConfig

EGGS = "Take two eggs and stir them."


def reply(body: dict[str, Any]) -> str:
    return EGGS


def config_for(fake: Fake, source: str = "ollama", **changes: object) -> LLMConfig:
    times = {"connect": 0.5, "generation": 0.3, "grading": 0.3, "interval": 0.01, "total": 5}
    options: dict[str, object] = {f"timeout_{name}": value for name, value in times.items()}
    options |= {"data_source": source, "llm_host": fake.url, "gen_model": "writer"}
    return LLMConfig.model_validate({**options, **changes})


def ask(config: LLMConfig, times: int = 1, notes: list[str] | None = None, **changes: Any) -> list[Answer]:
    """The answers to `times` questions at once, within the client's deadline."""
    question = {"model": "writer", "prompt": "eggs", "seconds": 0.3, "seed": 5, "max_tokens": 768, **changes}
    answers: list[Answer] = []

    async def work(client: LLMClient) -> None:
        answers.extend(await asyncio.gather(*(client.ask(**question) for _ in range(times))))

    note = (notes if notes is not None else []).append
    use_server(config, work, {"gen_model": config.gen_model}, note=note)
    return answers


@pytest.mark.parametrize(
    ("options", "path", "sent"),
    [
        (
            {"source": "ollama"},
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "eggs"}], "reasoning_effort": "none"},
        ),
        (
            {"source": "openai"},
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "eggs"}]},
        ),
        ({"source": "openai", "llm_endpoint": "completions"}, "/v1/completions", {"prompt": "eggs"}),
    ],
)
def test_what_is_sent_and_read(
    options: dict[str, str], path: str, sent: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more: the client would send these variables to any server."""
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "sk-for-another-server")
    with Fake(reply=reply) as fake:
        assert ask(config_for(fake, **options)) == [Answer(EGGS, True)]
        assert ask(config_for(fake, **options), max_tokens=3) == [Answer("Take two eggs", False)]
    common = {"model": "writer", "max_tokens": 768, "seed": 5, "temperature": 0.9}
    assert fake.bodies(path)[0] == {**common, **sent}
    headers = fake.requests[1][1]
    assert headers.pop("host") == fake.url.removeprefix("http://")
    assert headers.pop("content-length")
    assert headers == {
        "user-agent": "fusedgpt",
        "accept-encoding": "identity",
        "content-type": "application/json",
    }


@pytest.mark.parametrize("source", ["ollama", "openai"])
def test_the_key_goes_to_the_server_and_nowhere_else(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with Fake(reply=lambda body: "The key is sk-secret-1, they say.") as fake, Fake() as trap:
        config = config_for(fake, source, llm_api_key_env="MY_KEY")
        assert ask(config)[0].text == "The key is , they say."
        assert {headers["authorization"] for _, headers, _ in fake.requests} == {"Bearer sk-secret-1"}
        fake.redirect_to = f"{trap.url}/sk-secret-1"
        fake.fault = lambda path, number: "redirect"
        with pytest.raises(LLMError, match=r"redirects to .*not followed") as caught:
            ask(config)
        assert "sk-secret" not in str(caught.value)
    assert trap.requests == []
    assert "sk-secret" not in repr(config) + config.model_dump_json()


def test_a_missing_model_is_told_with_those_there_are() -> None:
    with Fake() as fake:
        with pytest.raises(LLMError) as caught:
            ask(config_for(fake, gen_model="llama9"))
        text = str(caught.value)
        assert "has no model 'llama9'; it has grader:7b, writer:latest" in text
        assert "`ollama pull llama9` or choose another --gen-model" in text
        with pytest.raises(LLMError, match=r"--gen-model is needed; .* has grader:7b, writer:latest"):
            ask(config_for(fake, gen_model=None))
        with pytest.raises(LLMError, match=r"404 .model 'x' not found.* models grader:7b, writer:latest"):
            ask(config_for(fake, "openai", gen_model="x"), model="x")


@pytest.mark.parametrize("fault", ["500", "bad_json", "empty", "silent", "redirect"])
def test_an_openai_server_need_not_list_its_models(fault: str) -> None:
    broken = {"/v1/models": fault}
    with Fake(reply=reply, fault=lambda path, number: broken.get(path)) as fake:
        assert ask(config_for(fake, "openai")) == [Answer(EGGS, True)]
        with pytest.raises(LLMError, match=r"no Ollama server|redirects to"):
            ask(config_for(fake, "ollama"))


def test_a_server_without_a_list_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """404 for it: an OpenAI-compatible one is asked all the same, but that is no Ollama."""
    with Fake(reply=reply) as fake:
        monkeypatch.setattr(
            fake.server.RequestHandlerClass,
            "v1_models",
            lambda self, _: self.send_raw(404, b"404 page not found", "text/plain"),
        )
        assert ask(config_for(fake, "openai")) == [Answer(EGGS, True)]
        with pytest.raises(LLMError, match=r"v1/models is not there .*is that an Ollama server"):
            ask(config_for(fake, "ollama"))


def test_a_server_that_is_down() -> None:
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for source, remedy in (("ollama", "`ollama serve`"), ("openai", "`transformers serve")):
            started = time.monotonic()
            with pytest.raises(LLMError) as caught:
                ask(LLMConfig.model_validate({"data_source": source, "llm_host": url, "gen_model": "w"}))
            assert time.monotonic() - started < 1
            assert url in str(caught.value)
            assert remedy in str(caught.value)
            assert "--data-source template" in str(caught.value)


def test_names_that_lead_nowhere_or_astray(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLMConfig(data_source="ollama", llm_host="http://box.example:1", timeout_connect=0.2)

    def resolves_to(*addresses: str) -> None:
        rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 1)) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: rows)

    resolves_to("169.254.169.254")
    with pytest.raises(ValueError, match="link-local"):
        ask(config)
    resolves_to("10.0.0.1", "fe80::1%eth0")
    with pytest.raises(ValueError, match="link-local"):
        ask(config)
    resolves_to()
    with pytest.raises(LLMError, match=r"'box.example' of --llm-host cannot be found"):
        ask(config)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(3) or [])
    started = time.monotonic()
    with pytest.raises(LLMError, match="cannot be found"):
        ask(config)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("host", ["2852039166", "0xa9fea9fe", "169.254.43518", "0251.0376.0251.0376"])
def test_odd_spellings_of_an_address_are_resolved_before_it_is_checked(host: str) -> None:
    with pytest.raises(ValueError, match=r"leads to 169.254.169.254|is not a URL"):
        ask(LLMConfig(data_source="ollama", llm_host=f"http://{host}"))


def test_a_key_does_not_leave_this_machine_unencrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    found = ["127.0.0.1"]
    monkeypatch.setattr(llm_transport, "look_up", lambda url, seconds: found)
    with Fake(reply=reply) as fake:
        port = fake.url.rpartition(":")[2]
        options: dict[str, Any] = {"llm_host": f"http://box.example:{port}", "llm_api_key_env": "MY_KEY"}
        assert ask(config_for(fake, **options)) == [Answer(EGGS, True)]
        for found[:] in (["10.0.0.1"], ["127.0.0.1", "10.0.0.1"], ["64:ff9b::7f00:1"]):
            with pytest.raises(ValueError, match=r"box.example.* unencrypted: use https, .*--llm-allow-http"):
                ask(config_for(fake, **options))
        found[:] = ["127.0.0.1", "10.0.0.1"]
        assert ask(config_for(fake, **options, llm_allow_http=True)) == [Answer(EGGS, True)]
        assert ask(config_for(fake, llm_host=options["llm_host"])) == [Answer(EGGS, True)]  # there is no key


def test_a_url_that_only_httpx_finds_fault_with() -> None:
    with pytest.raises(ValueError, match=r"llm_host 'http://0251.0376.1.1' is not a URL: "):
        ask(LLMConfig(data_source="ollama", llm_host="http://0251.0376.1.1"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the certificate")
def test_the_certificate_has_to_be_that_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go to an address looked up before; the certificate is still checked against the name."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=box.example"
    make += f" -addext subjectAltName=DNS:box.example -keyout {key} -out {certificate}"
    subprocess.run(make.split(), check=True, capture_output=True)
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    monkeypatch.setattr(llm_transport, "look_up", lambda url, seconds: ["127.0.0.1"])
    with Fake(reply=reply) as fake:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        fake.server.socket = context.wrap_socket(fake.server.socket, server_side=True)
        port = fake.url.rpartition(":")[2]

        def ask_host(name: str) -> list[Answer]:
            return ask(config_for(fake, llm_host=f"https://{name}:{port}", llm_api_key_env="MY_KEY"))

        with pytest.raises(LLMError, match="certificate verify failed"):
            ask_host("box.example")  # signed by nobody that is trusted
        trusting = functools.partial(ssl.create_default_context, cafile=certificate)
        monkeypatch.setattr(httpcore2, "default_ssl_context", lambda **_: trusting())
        with pytest.raises(LLMError, match="Hostname mismatch"):
            ask_host("other.example")
        assert fake.requests == []
        assert ask_host("box.example") == [Answer(EGGS, True)]


def test_the_first_address_that_answers_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the name is looked up once: a second, different answer does not matter."""
    with Fake(reply=reply) as fake:
        port = int(fake.url.rpartition(":")[2])
        looked_up = []

        def getaddrinfo(host: str, *_: object, **__: object) -> list[Any]:
            looked_up.append(host)
            addresses = ["127.0.0.2", "127.0.0.1"] if len(looked_up) == 1 else ["127.0.0.9"]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        with monkeypatch.context() as patch:
            patch.setattr(llm_transport.socket, "getaddrinfo", getaddrinfo)
            found = llm_transport.look_up(httpx2.URL(f"http://somewhere.example:{port}"), 1)
            assert found == ["127.0.0.2", "127.0.0.1"]
        monkeypatch.setattr(llm_transport, "look_up", lambda url, seconds: found)
        host = f"http://somewhere.example:{port}"
        assert ask(config_for(fake, llm_host=host)) == [Answer(EGGS, True)]
        assert fake.requests[-1][1]["host"] == f"somewhere.example:{port}"


@pytest.mark.parametrize("status", ["429", "500"])
@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_respected_by_all_requests(status: str, as_date: bool) -> None:
    """The first of four is turned away; from then on nothing is sent before the time is over."""
    times: list[float] = []

    def fault(path: str, number: int) -> str | None:
        times.append(time.monotonic())
        fake.retry_after = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
        return status if number == 1 else None

    with Fake(reply=reply, fault=fault) as fake:
        assert len(ask(config_for(fake, llm_concurrency=1))) == 1
    pause = times[2] - times[1]
    assert 0.9 < pause < 2.5


def test_no_other_request_is_sent_while_told_to_wait() -> None:
    times: list[tuple[int, float]] = []

    def fault(path: str, number: int) -> str | None:
        times.append((number, time.monotonic()))
        return "429" if 1 <= number <= 4 else None

    with Fake(reply=reply, fault=fault, retry_after="0.7") as fake:
        assert len(ask(config_for(fake), times=4)) == 4
    first_refusal = dict(times)[1]
    assert all(when > first_refusal + 0.69 for number, when in times if number > 4)


def test_a_wait_past_the_deadline_is_not_begun() -> None:
    with Fake(fault=lambda path, number: "429" if number else None, retry_after="3600") as fake:
        started = time.monotonic()
        with pytest.raises(LLMError, match="asks to wait 3,600 s, past the end of --timeout-total 5"):
            ask(config_for(fake))
        assert time.monotonic() - started < 1


@pytest.mark.parametrize("value", ["", "soon", "-5", "nan", "1e400", "9" * 40, "Wed, 99 Foo 2020", "0"])
def test_a_retry_after_that_makes_no_sense_is_ignored(value: str) -> None:
    assert llm._seconds_to_wait(value) == 0


def test_waits_grow_and_vary() -> None:
    times: list[float] = []

    def fault(path: str, number: int) -> str | None:
        times.append(time.monotonic())
        return "500" if number else None

    with Fake(fault=fault) as fake, pytest.raises(RequestFailed, match="answers 500 'server busy"):
        ask(config_for(fake, timeout_interval=0.05))
    waits = [b - a for a, b in pairwise(times[1:])]
    assert len(waits) == 4
    for n, wait in enumerate(waits):
        assert 0.05 * 2**n <= wait < 0.05 * (2**n + 1) + 0.1


@pytest.mark.parametrize("status", ["400", "401", "403", "404"])
def test_what_will_not_pass_is_not_tried_again(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Fake(reply=reply) as fake:
        fake.fault = lambda path, number: "429" if number else None
        send = fake.server.RequestHandlerClass.send_object  # type: ignore[attr-defined]

        def with_status(self: Any, code: int, value: object, *more: Any) -> None:
            send(self, int(status) if code == 429 else code, value, *more)

        monkeypatch.setattr(fake.server.RequestHandlerClass, "send_object", with_status)
        with pytest.raises(LLMError) as caught:
            ask(config_for(fake))
    assert not isinstance(caught.value, RequestFailed)
    assert len(fake.requests) == 2
    assert status in str(caught.value)
    assert ("--llm-api-key-env" in str(caught.value)) == (status in ("401", "403"))


VLLM = {"object": "error", "message": "the prompt is too long", "type": "BadRequestError", "code": 400}


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(VLLM),
        "the prompt is too long",
        json.dumps("the prompt is too long"),
        json.dumps({"error": {"message": "the prompt is too long"}}),
        json.dumps({"error": True, "message": "the prompt is too long"}),
        json.dumps({"error": {"reason": "the prompt is too long"}}),
        json.dumps({"detail": [{"loc": ["body", "prompt"], "msg": "the prompt is too long"}]}),
        json.dumps({"reason": "the prompt is too long"}),
        "<html>\n<p>the prompt is too long</p>",
    ],
)
@pytest.mark.parametrize("status", [400, 413, 422, 500])
def test_the_reason_of_an_error_is_shown(data: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with Fake() as fake:
        handler = fake.server.RequestHandlerClass
        monkeypatch.setattr(
            handler, "v1_complete", lambda self, _: self.send_raw(status, data.encode(), "a/b")
        )
        with pytest.raises(LLMError, match=rf"answers {status} .*the prompt is too long"):
            ask(config_for(fake, "openai", timeout_interval=0.001))


@pytest.mark.parametrize("data", [VLLM, {"error": {"message": VLLM["message"]}}, {"error": VLLM["message"]}])
def test_an_error_with_the_status_of_an_answer(data: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with Fake() as fake:
        handler = fake.server.RequestHandlerClass
        monkeypatch.setattr(handler, "v1_complete", lambda self, _: self.send_object(200, data))
        with pytest.raises(RequestFailed, match="the server says 'the prompt is too long'"):
            ask(config_for(fake, "openai"))


def test_a_refused_parameter_is_left_out_with_one_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral's words for seed, OpenAI's for the other two; all four requests in flight are refused."""
    reasons = {
        "seed": {"message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"]}]}},
        "temperature": {"error": {"message": "Unsupported value: 'temperature' does not support 0.9."}},
        "max_tokens": {"error": {"message": "Unsupported: 'max_tokens'. Use 'max_completion_tokens'."}},
    }
    notes: list[str] = []
    with Fake(reply=reply) as fake:
        handler: Any = fake.server.RequestHandlerClass
        complete = handler.v1_complete

        def refuse(self: Any, body: dict[str, Any]) -> None:
            refused = next((name for name in reasons if name in body), None)
            self.send_object(422, reasons[refused]) if refused else complete(self, body)

        monkeypatch.setattr(handler, "v1_complete", refuse)
        assert ask(config_for(fake, "openai"), times=4, notes=notes) == [Answer(EGGS, True)] * 4
    assert [note.partition(" from now on: ")[0] for note in notes] == [
        "the server refuses seed, which is left out",
        "the server refuses temperature, which is left out",
        "the server refuses max_tokens, which is named max_completion_tokens",
    ]
    kept = {"model", "messages", "max_completion_tokens"}
    assert fake.bodies("/v1/chat/completions")[-1].keys() == kept


THOUGHTS = "Okay, the user wants eggs. " + "Should they be fried or boiled? " * 150
THINKERS: dict[str, Callable[[str, str], dict[str, str]]] = {
    "reasoning": lambda thought, said: {"content": said, "reasoning": thought},
    "reasoning_content": lambda thought, said: {"content": said, "reasoning_content": thought},
    "tags": lambda thought, said: {
        "content": f"<think>{thought}</think>{said}" if said else f"<think>{thought}"
    },
    "aloud": lambda thought, said: {"content": f"{thought}</think>{said}" if said else thought},
}


def let_it_think(fake: Fake, monkeypatch: pytest.MonkeyPatch, style: str, off: str | None = None) -> None:
    """The model writes its thoughts first, within the same limit, unless the request holds `off`."""

    def complete(self: Any, body: dict[str, Any]) -> None:
        limit = body.get("max_tokens", 0)
        thought, said = THOUGHTS.split(" ")[:limit], EGGS
        if off is not None and off in json.dumps(body):
            thought = []
        elif len(thought) == limit:
            said = ""
        message = THINKERS[style](" ".join(thought), said)
        choice = {"index": 0, "message": message, "finish_reason": "stop" if said else "length"}
        self.send_object(200, {"choices": [choice]})

    monkeypatch.setattr(fake.server.RequestHandlerClass, "v1_complete", complete)


@pytest.mark.parametrize("style", THINKERS)
@pytest.mark.parametrize("source", ["ollama", "openai"])
def test_a_model_that_thinks_first_gets_room_for_it(
    source: str, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    with Fake() as fake:
        let_it_think(fake, monkeypatch, style)
        answers = ask(config_for(fake, source), times=3, notes=notes, seconds=5)
    assert [strip_thoughts(answer.text) for answer in answers] == [EGGS] * 3
    assert len(fake.bodies("/v1/chat/completions")) == 6
    assert len(notes) == 1
    assert re.match("writer answers with thoughts alone: from now on .* 4,096 tokens more", notes[0])


@pytest.mark.parametrize(
    ("source", "off", "requests"),
    [("ollama", '"reasoning_effort": "none"', 1), ("openai", '"enable_thinking": false', 2)],
)
def test_thinking_is_turned_off_where_the_server_can(
    source: str, off: str, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Fake() as fake:
        let_it_think(fake, monkeypatch, "reasoning", off)
        assert ask(config_for(fake, source), max_tokens=64, seconds=5) == [Answer(EGGS, True)]
    assert len(fake.bodies("/v1/chat/completions")) == requests


def test_a_model_that_does_nothing_but_think_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with Fake() as fake:
        monkeypatch.setitem(THINKERS, "never", lambda thought, said: {"content": "", "reasoning": thought})
        let_it_think(fake, monkeypatch, "never")
        assert ask(config_for(fake, "openai"), seconds=5) == [Answer("", True, thoughts=True)]
    assert len(fake.bodies("/v1/chat/completions")) == 2


def test_a_slow_server_gets_fewer_requests() -> None:
    """One that works on one request at a time, 0.15 s each, cannot do four within 0.3 s."""
    notes: list[str] = []
    one_at_a_time = threading.Lock()

    def slow(body: dict[str, Any]) -> str:
        with one_at_a_time:
            time.sleep(0.15)
        return EGGS

    with (
        Fake(reply=slow) as fake,
        pytest.raises(RequestFailed, match=r"no whole answer within 0.3 s \(for longer: --timeout-gen"),
    ):
        ask(config_for(fake), times=8, notes=notes)
    assert notes[0] == "the server is slow to answer: from now on 2 request(s) at a time"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a\x1b[31mred\x1b[0m b", "ared b"),
        ("a\x1b]0;title\x07b", "ab"),
        ("a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\b", "alinkb"),
        ("a\x00\x07\x08\x7f\x9bb", "ab"),
        ("a\r\nb\rc\td", "a\nb\nc\td"),
        ("a\u202eb\u2066c\ufeffd\ud800e", "abcde"),
        ("👩\u200d🍳 naïve 料理", "👩\u200d🍳 naïve 料理"),
        ("a\x1b", "a"),
        ("a\x1bPdevice control", "a"),
    ],
)
def test_plain_text(text: str, plain: str) -> None:
    assert plain_text(text) == plain


def test_names_from_the_server_are_cleaned() -> None:
    with Fake(models=("\x1b[31mevil\x1b[0m\nname",)) as fake, pytest.raises(LLMError) as caught:
        ask(config_for(fake))
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "line", ['{"data": 5}', "[]", "5", '{"data": [5]}', '{"data": [{}]}', "[" * 100_000, '"a"', "null"]
)
def test_lists_of_models_that_are_none(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Fake() as fake:
        monkeypatch.setattr(
            fake.server.RequestHandlerClass,
            "v1_models",
            lambda self, body: self.send_raw(200, line.encode(), "application/json"),
        )
        with pytest.raises(LLMError, match=r"no Ollama server answers|it has none that it lists"):
            ask(config_for(fake, timeout_interval=0.001))


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "[]",
        "{",
        "null",
        "\xff",
        '{"choices": [{"message": {"content": "a"}}',
        "[" * 100_000,
        '{"choices": ' + "[" * 100_000,
        '{"choices": 5}',
        '{"choices": [5]}',
        '{"choices": []}',
        '{"choices": [{"text": 5, "message": {"content": 5}}]}',
        '{"choices": [{"text": ["a"], "message": {"content": ["a"]}}]}',
        '{"choices": [{"message": "a"}]}',
        '{"choices": [{"message": null}]}',
        '{"choices": {"0": {"text": "a"}}}',
        '{"choices": ' + "9" * 5000 + "}",
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_answers_that_are_none(line: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Fake() as fake:
        handler = fake.server.RequestHandlerClass
        data = line.encode("latin-1")
        monkeypatch.setattr(handler, "v1_complete", lambda self, _: self.send_raw(200, data, "a/b"))
        with pytest.raises(RequestFailed, match=r"expected (text|an answer), found"):
            ask(config_for(fake, "openai", llm_endpoint=endpoint, timeout_interval=0.001), seconds=9.0)


@pytest.mark.parametrize(
    ("fault", "reason"), [("endless", "bigger than 4 MiB"), ("bomb", "expected an answer")]
)
def test_an_answer_too_big_is_given_up(fault: str, reason: str) -> None:
    huge = Fake(fault=lambda _, number: fault if number else None)
    with huge as fake, pytest.raises(RequestFailed, match=reason):
        ask(config_for(fake, timeout_interval=0.001), seconds=5)


def test_in_a_running_loop_as_in_a_notebook() -> None:
    async def notebook() -> list[Answer]:
        return ask(config_for(fake))

    with Fake(reply=reply) as fake:
        assert asyncio.run(notebook()) == [Answer(EGGS, True)]


def test_jobs_stop_the_others_and_pass_on_what_fails() -> None:
    seen = []

    async def sleeper() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            seen.append("cancelled")

    async def fails(error: LLMError) -> None:
        raise error

    async def returns() -> None:
        seen.append("returned")

    def run(jobs: list[Coroutine[Any, Any, None]], done: bool = False, at_once: int = 2) -> None:
        async def main() -> None:
            client = LLMClient(LLMConfig(data_source="ollama", llm_concurrency=at_once), print)
            await client.run_jobs(iter(jobs), lambda: done and "returned" in seen)

        asyncio.run(asyncio.wait_for(main(), 5))

    with pytest.raises(LLMError, match="boom"):
        run([sleeper(), fails(LLMError("boom"))])
    assert seen == ["cancelled"]
    run([sleeper(), returns()], done=True)
    assert seen == ["cancelled", "returned", "cancelled"]
    seen.clear()
    failures = [fails(RequestFailed(str(n))) for n in range(8)]
    run([*failures[:4], returns(), *failures[4:]], at_once=1)
    assert seen == ["returned"]
    with pytest.raises(LLMError, match="5 requests in a row failed, the last: 4; see the server's log"):
        run([fails(RequestFailed(str(n))) for n in range(5)], at_once=1)
