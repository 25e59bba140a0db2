"""A server with Ollama's published API and its OpenAI-compatible part, for tests; it can be told to fail.

Ollama: https://docs.ollama.com/api (version, tags, ps, generate), and /v1 (models, chat/completions,
completions). test_llm_fake.py holds it against the official `ollama` and `openai` clients.

A fault is chosen for each request by `Fake.fault(path, number)`, which returns one of FAULTS or None.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

FAULTS = (
    "refused",  # the connection is closed unanswered; Fake.stop() makes it a real refusal
    "429",
    "500",
    "slow",  # a piece now and then, for ever
    "silent",  # not even a header
    "header",  # a header without end
    "cut",
    "cut_chunk",
    "bad_json",
    "empty",
    "endless",
    "huge_line",
    "redirect",
    "error_line",
)
_CREATED = "2025-05-10T08:06:48.639712648-07:00"
_WORDS = """
    salt river lantern quiet baker window copper garden winter letter engine orange shadow
    kettle harbor velvet thunder pocket meadow ladder cinnamon anchor whistle marble feather
    candle village pepper ocean mirror saddle basket hammer silver forest blanket teacher
    bridge island button
""".split()  # noqa: SIM905


def varied_text(seed: int) -> str:
    """Two texts of 30 words or so that hardly share a three-word run with those of another seed."""
    rng = Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices(_WORDS, k=10)).capitalize() + "."

    return "\n===\n".join(" ".join(sentence() for _ in range(3)) for _ in range(2))


def default_reply(body: dict[str, Any]) -> str:
    """A grade where one is asked for, else texts that depend on the seed."""
    if "Score:" in prompt_of(body):
        return "Score: 8"
    return varied_text(seed_of(body))


def prompt_of(body: dict[str, Any]) -> str:
    return str(body.get("prompt") or (body.get("messages") or [{"content": ""}])[-1]["content"])


def seed_of(body: dict[str, Any]) -> int:
    return int(body.get("options", {}).get("seed", body.get("seed", 0)) or 0)


class Fake:
    """Serves on a free port of 127.0.0.1 while it is entered; `requests` holds (path, headers, body)."""

    def __init__(
        self,
        *,
        models: tuple[str, ...] = ("writer:latest", "grader:7b"),
        reply: Callable[[dict[str, Any]], str] = default_reply,
        fault: Callable[[str, int], str | None] = lambda path, number: None,
        delay: float = 0.0,
        retry_after: str | None = None,
        redirect_to: str = "http://127.0.0.1:9/",
        port: int = 0,
    ) -> None:
        self.models, self.reply, self.fault, self.delay = models, reply, fault, delay
        self.retry_after, self.redirect_to = retry_after, redirect_to
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.numbers = itertools.count()
        self.over = threading.Event()
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.fake = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Fake:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop listening: who connects from now on is refused."""
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for where, _, body in self.requests if where == path]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    fake: Fake

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are the point of many a test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request({})

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        try:
            body = json.loads(self.rfile.read(length) or b"{}")
        except ValueError:
            self.send_object(400, {"error": "invalid character in request"})
            return
        self.handle_request(body)

    def handle_request(self, body: dict[str, Any]) -> None:
        fake = self.server.fake
        with fake.lock:
            number = next(fake.numbers)
            fake.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            fake.in_flight += 1
            fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
        try:
            if fault := fake.fault(self.path, number):
                self.fail(fault)
            else:
                self.answer(body)
        finally:
            with fake.lock:
                fake.in_flight -= 1

    def answer(self, body: dict[str, Any]) -> None:
        routes: dict[tuple[str, str], Callable[[dict[str, Any]], None]] = {
            ("GET", "/"): self.root,
            ("GET", "/api/version"): lambda _: self.send_object(200, {"version": "0.12.6"}),
            ("GET", "/api/tags"): self.tags,
            ("GET", "/api/ps"): self.tags,
            ("POST", "/api/generate"): self.generate,
            ("GET", "/v1/models"): self.v1_models,
            ("POST", "/v1/chat/completions"): self.v1_complete,
            ("POST", "/v1/completions"): self.v1_complete,
        }
        route = routes.get((self.command, self.path))
        if route is None:
            self.send_raw(404, b"404 page not found", "text/plain")
        else:
            route(body)

    def root(self, body: dict[str, Any]) -> None:
        self.send_raw(200, b"Ollama is running", "text/plain; charset=utf-8")

    def tags(self, body: dict[str, Any]) -> None:
        details = {
            "parent_model": "",
            "format": "gguf",
            "family": "llama",
            "families": ["llama"],
            "parameter_size": "3.2B",
            "quantization_level": "Q4_K_M",
        }
        more = (
            {"expires_at": _CREATED, "size_vram": 0} if self.path == "/api/ps" else {"modified_at": _CREATED}
        )
        rows = [
            {"name": n, "model": n, "size": 2019393189, "digest": "a80c4f17acd5", "details": details, **more}
            for n in self.server.fake.models
        ]
        self.send_object(200, {"models": rows})

    def known(self, model: object) -> bool:
        names = self.server.fake.models
        return model in names or f"{model}:latest" in names

    def pieces(self, body: dict[str, Any]) -> Iterator[str]:
        """The reply, a word at a time, at most as many as the request allows."""
        fake = self.server.fake
        if fake.delay:
            time.sleep(fake.delay)
        text = fake.reply(body)
        limit = body.get("options", {}).get("num_predict", body.get("max_tokens")) or 10_000
        parts = text.split(" ")
        self.end = "stop" if len(parts) <= limit else "length"
        parts = parts[:limit]
        for i in range(0, len(parts), 8):
            yield (" " if i else "") + " ".join(parts[i : i + 8])

    def generate(self, body: dict[str, Any]) -> None:
        model = body.get("model")
        if not self.known(model):
            self.send_object(404, {"error": f"model '{model}' not found"})
            return
        common = {"model": model, "created_at": _CREATED}
        if not body.get("prompt"):
            self.send_object(200, {**common, "response": "", "done": True, "done_reason": "load"})
            return
        pieces = list(self.pieces(body))
        last = {
            "done": True,
            "done_reason": self.end,
            "context": [1, 2, 3],
            "total_duration": 10706818083,
            "load_duration": 6338219291,
            "prompt_eval_count": 26,
            "prompt_eval_duration": 130079000,
            "eval_count": len(pieces),
            "eval_duration": 4232710000,
        }
        if body.get("stream", True):
            self.start_stream("application/x-ndjson")
            for piece in pieces:
                self.send_line({**common, "response": piece, "done": False})
            self.send_line({**common, "response": "", **last})
            self.end_stream()
        else:
            self.send_object(200, {**common, "response": "".join(pieces), **last})

    def v1_models(self, body: dict[str, Any]) -> None:
        rows = [
            {"id": name, "object": "model", "created": 1746889608, "owned_by": "library"}
            for name in self.server.fake.models
        ]
        self.send_object(200, {"object": "list", "data": rows})

    def v1_complete(self, body: dict[str, Any]) -> None:
        model, chat = body.get("model"), "chat" in self.path
        if not self.known(model):
            message = f"model '{model}' not found"
            error = {"message": message, "type": "not_found_error", "param": None, "code": None}
            self.send_object(404, {"error": error})
            return
        pieces = list(self.pieces(body))
        kind = ("chat.completion" if chat else "text_completion") + (
            ".chunk" if chat and body.get("stream") else ""
        )
        common = {"id": "cmpl-1", "object": kind, "created": 1746889608, "model": model}
        common["system_fingerprint"] = "fp_ollama"

        def choice(text: str, end: str | None) -> list[dict[str, Any]]:
            message = {"role": "assistant", "content": text}
            part = {("delta" if body.get("stream") else "message"): message} if chat else {"text": text}
            return [{"index": 0, **part, "finish_reason": end}]

        if body.get("stream"):
            self.start_stream("text/event-stream")
            for piece in pieces:
                self.send_event({**common, "choices": choice(piece, None)})
            self.send_event({**common, "choices": choice("", self.end)})
            self.chunk(b"data: [DONE]\n\n")
            self.end_stream()
        else:
            usage = {"prompt_tokens": 26, "completion_tokens": len(pieces), "total_tokens": 26 + len(pieces)}
            self.send_object(200, {**common, "choices": choice("".join(pieces), self.end), "usage": usage})

    def fail(self, fault: str) -> None:
        fake = self.server.fake
        self.close_connection = True
        ndjson = self.path.startswith("/api")
        if fault == "refused":
            return
        if fault in ("429", "500"):
            more = {"Retry-After": fake.retry_after} if fake.retry_after else {}
            self.send_object(int(fault), {"error": "server busy, please try again"}, more)
        elif fault == "redirect":
            self.send_object(307, {}, {"Location": fake.redirect_to})
        elif fault == "silent":
            fake.over.wait(60)
        elif fault == "header":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not fake.over.wait(0.02):
                self.wfile.write(b"X-More: and more\r\n")
        else:
            self.start_stream("application/x-ndjson" if ndjson else "text/event-stream")
            self.fail_in_stream(fault)

    def fail_in_stream(self, fault: str) -> None:
        fake = self.server.fake
        sound = {"model": "writer", "created_at": _CREATED, "response": "word ", "done": False}
        if not self.path.startswith("/api"):
            sound = {"choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}]}
        send = self.send_line if self.path.startswith("/api") else self.send_event
        if fault == "slow":
            while not fake.over.wait(0.05):
                send(sound)
        elif fault == "endless":
            while not fake.over.is_set():
                send(sound)
        elif fault == "huge_line":
            while not fake.over.is_set():
                self.chunk(b"x" * 65_536)
        elif fault == "cut":  # a proper end of the body, but not of the answer
            send(sound)
            self.end_stream()
        elif fault == "cut_chunk":
            send(sound)
            self.wfile.write(b"40\r\nhalf")
        elif fault == "bad_json":
            self.chunk(
                b'{"response": "half \n' if self.path.startswith("/api") else b'data: {"choices": [\n\n'
            )
            self.end_stream()
        elif fault == "error_line":
            send({"error": "llama runner process has terminated"})
            self.end_stream()
        elif fault == "empty":
            self.end_stream()
        else:
            raise ValueError(fault)

    def send_object(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self.send_raw(status, json.dumps(value).encode(), "application/json; charset=utf-8", headers)

    def send_raw(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_header()
        self.wfile.write(data)

    def start_stream(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_header()

    def end_header(self) -> None:
        if self.close_connection:  # a fault; the next request must not go into a closed connection
            self.send_header("Connection", "close")
        self.end_headers()

    def send_line(self, value: object) -> None:
        self.chunk(json.dumps(value).encode() + b"\n")

    def send_event(self, value: object) -> None:
        self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")
