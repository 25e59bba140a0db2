"""A server with the part of OpenAI's API that Ollama and others have, for tests; it can be told to fail.

https://platform.openai.com/docs/api-reference: models, chat/completions, completions.

A fault is chosen for each request by `Fake.fault(path, number)`, which returns one of FAULTS or None.
"""

from __future__ import annotations

import gzip
import itertools
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

FAULTS = (
    "refused",  # the connection is closed unanswered; Fake.stop() makes it a real refusal
    "429",
    "500",
    "slow",  # a byte now and then, for ever
    "silent",  # not even a header
    "header",  # a header without end
    "cut",  # a proper end of the body, but not of the answer
    "cut_chunk",
    "bad_json",
    "empty",
    "endless",
    "bomb",  # small, but not once decompressed
    "redirect",
    "error",  # with the status of an answer
)
_BODIES = {
    "cut": b'{"choices": [{"index": 0, "message": {"content": "half',
    "bad_json": b"<html>busy</html>",
    "empty": b"",
    "bomb": gzip.compress(b" " * (8 << 20)),
    "error": b'{"error": {"message": "llama runner process has terminated"}}',
}
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
    return int(body.get("seed") or 0)


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
            ("GET", "/v1/models"): self.v1_models,
            ("POST", "/v1/chat/completions"): self.v1_complete,
            ("POST", "/v1/completions"): self.v1_complete,
        }
        route = routes.get((self.command, self.path))
        if route is None:
            self.send_raw(404, b"404 page not found", "text/plain")
        else:
            route(body)

    def v1_models(self, body: dict[str, Any]) -> None:
        rows = [
            {"id": name, "object": "model", "created": 1746889608, "owned_by": "library"}
            for name in self.server.fake.models
        ]
        self.send_object(200, {"object": "list", "data": rows})

    def v1_complete(self, body: dict[str, Any]) -> None:
        """The reply, at most as many words as the request allows."""
        fake, model = self.server.fake, body.get("model")
        if model not in fake.models and f"{model}:latest" not in fake.models:
            message = f"model '{model}' not found"
            error = {"message": message, "type": "not_found_error", "param": None, "code": None}
            self.send_object(404, {"error": error})
            return
        time.sleep(fake.delay)
        words = fake.reply(body).split(" ")
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 10_000
        end = "stop" if len(words) <= limit else "length"
        text, chat = " ".join(words[:limit]), "chat" in self.path
        answer = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        kind = "chat.completion" if chat else "text_completion"
        row = {"id": "cmpl-1", "object": kind, "created": 1746889608, "model": model}
        self.send_object(200, {**row, "choices": [{"index": 0, **answer, "finish_reason": end}]})

    def fail(self, fault: str) -> None:
        fake = self.server.fake
        self.close_connection = True
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
            self.fail_in_body(fault)

    def fail_in_body(self, fault: str) -> None:
        over = self.server.fake.over
        if fault in _BODIES:
            coded = {"Content-Encoding": "gzip"} if fault == "bomb" else None
            self.send_raw(200, _BODIES[fault], "application/json", coded)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_header()
        if fault == "slow":
            while not over.wait(0.05):
                self.chunk(b" ")
        elif fault == "endless":
            while not over.is_set():
                self.chunk(b" " * 65_536)
        elif fault == "cut_chunk":
            self.chunk(_BODIES["cut"])
            self.wfile.write(b"40\r\nhalf")
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

    def end_header(self) -> None:
        if self.close_connection:  # a fault; the next request must not go into a closed connection
            self.send_header("Connection", "close")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
