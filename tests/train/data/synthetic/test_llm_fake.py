"""The fake server against the official clients: what they accept, ours may be tested on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ollama_fake import Fake

ollama = pytest.importorskip("ollama")
openai = pytest.importorskip("openai")


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake(reply=lambda body: "Take two eggs and stir them in the pan until they set firmly.") as fake:
        yield fake


def test_ollama_client(fake: Fake) -> None:
    client = ollama.Client(host=fake.url)
    assert [model.model for model in client.list().models] == ["writer:latest", "grader:7b"]
    assert client.list().models[0].details.family == "llama"
    assert client.list().models[0].modified_at.year == 2025
    assert [model.model for model in client.ps().models] == ["writer:latest", "grader:7b"]
    whole = client.generate("writer", "eggs", options={"seed": 3})
    assert whole.response.startswith("Take two eggs")
    assert (whole.done, whole.done_reason) == (True, "stop")
    pieces = list(client.generate("writer", "eggs", stream=True, think=False))
    assert "".join(piece.response for piece in pieces) == whole.response
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].eval_count > 0
    short = client.generate("writer", "eggs", options={"num_predict": 3})
    assert (short.response, short.done_reason) == ("Take two eggs", "length")
    assert client.generate("writer").done_reason == "load"
    with pytest.raises(ollama.ResponseError, match="model 'nobody' not found") as caught:
        client.generate("nobody", "eggs")
    assert caught.value.status_code == 404


def test_ollama_client_sees_the_faults(fake: Fake) -> None:
    client = ollama.Client(host=fake.url, timeout=0.3)
    fake.fault = lambda path, number: "500"
    with pytest.raises(ollama.ResponseError, match="server busy") as caught:
        client.generate("writer", "eggs")
    assert caught.value.status_code == 500
    fake.fault = lambda path, number: "error_line"
    with pytest.raises(ollama.ResponseError, match="runner process has terminated"):
        list(client.generate("writer", "eggs", stream=True))
    fake.stop()
    with pytest.raises(ConnectionError):
        client.list()


def test_openai_client(fake: Fake) -> None:
    client = openai.OpenAI(base_url=f"{fake.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["writer:latest", "grader:7b"]
    messages = [{"role": "user", "content": "eggs"}]
    whole = client.chat.completions.create(model="writer", messages=messages)
    text = whole.choices[0].message.content
    assert text.startswith("Take two eggs")
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(model="writer", messages=messages, stream=True, seed=1))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "stop"
    plain = client.completions.create(model="writer", prompt="eggs", max_tokens=3)
    assert (plain.choices[0].text, plain.choices[0].finish_reason) == ("Take two eggs", "length")
    chunks = list(client.completions.create(model="writer", prompt="eggs", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    with pytest.raises(openai.NotFoundError, match="model 'nobody' not found"):
        client.chat.completions.create(model="nobody", messages=messages)
    fake.fault = lambda path, number: "429"
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="writer", messages=messages)
