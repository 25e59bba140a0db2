"""A real server: `transformers serve` with a tiny GPT-2 of ours writes and grades. Run: pytest -m serving.

Needs the extra "serving".
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest

from fusedgpt.train.data.synthetic.collect import collect, generate_texts
from fusedgpt.train.data.synthetic.jsonl import read_objects
from fusedgpt.train.data.synthetic.llm_answer import LLMError
from fusedgpt.train.data.synthetic.llm_config import LLMConfig
from fusedgpt.train.data.synthetic.task import Task

pytestmark = pytest.mark.serving
SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 512, "max_length": 128}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"


class Server(NamedTuple):
    url: str
    model: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model trained for some seconds on template texts, served on the loopback interface."""
    pytest.importorskip("uvicorn", reason="pip install 'fusedgpt[serving]'")
    root = tmp_path_factory.mktemp("serving")
    folder = train_tiny(root)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", "--host", "127.0.0.1"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu", folder], env=env, stdout=log, stderr=log
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, root / "log")
            yield Server(f"http://127.0.0.1:{port}", str(folder))
        finally:
            process.terminate()
            process.wait(20)


def train_tiny(root: Path) -> Path:
    from fusedgpt.train.config import build_config
    from fusedgpt.train.pipeline import train_on_files

    texts = generate_texts(Task(prompt="", domain="conversation"), 30_000)
    (root / "texts.txt").write_text("\n\n".join(texts))
    config = build_config({**SHAPE, "steps": 150, "batch_size": 4, "learning_rate": 3e-3})
    return train_on_files([root / "texts.txt"], config, root / "models").model_path


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        try:
            if httpx2.get(url, trust_env=False).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        assert process.poll() is None, log.read_text()[-2000:]
        time.sleep(0.5)
    raise TimeoutError(log.read_text()[-2000:])


def config_for(server: Server, **changes: object) -> LLMConfig:
    options: dict[str, object] = {
        "data_source": "openai",
        "llm_host": server.url,
        "gen_model": server.model,
        "llm_max_tokens": 200,
        "timeouts": "cpu",
        "timeout_total": 240,
    }
    return LLMConfig.model_validate({**options, **changes})


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_it_writes_and_grades(server: Server, tmp_path: Path, endpoint: str) -> None:
    notes: list[str] = []
    task = Task(prompt="a conversation of two friends", domain="conversation", note=notes.append)
    config = config_for(server, llm_endpoint=endpoint)
    texts, info = collect(task, config, raw_tokens=1500, refined_tokens=600, work_dir=tmp_path)
    print(json.dumps(info, indent=1), *notes, sep="\n")
    samples = next(tmp_path.rglob("samples.jsonl"))
    assert info["generation"]["tokens"] >= 1500
    assert [record["text"] for record in read_objects(samples)]
    assert set(texts) <= {record["text"] for record in read_objects(samples)}
    grades = info["refinement"]["grades"]  # a model this small gives none; then it was asked twice
    asked = grades.get("by the model", 0) + grades.get("by heuristics", 0)
    assert asked == info["generation"]["samples"]
    assert info["refinement"]["kept_tokens"] >= 300


def test_a_model_that_is_not_there(server: Server, tmp_path: Path) -> None:
    task = Task(prompt="x", domain="general")
    config = config_for(server, gen_model="absent/model", timeout_total=60)
    with pytest.raises(LLMError) as caught:
        collect(task, config, raw_tokens=100, refined_tokens=50, work_dir=tmp_path)
    print(caught.value)


def test_create_end_to_end(server: Server, tmp_path: Path) -> None:
    """`fusedgpt create` against the server: a model folder whose data another model of ours wrote."""
    shape = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "64", "--max-length", "64"]
    llm = ["--data-source", "openai", "--llm-host", server.url, "--gen-model", server.model]
    limits = [
        "--llm-max-tokens",
        "200",
        "--timeouts",
        "cpu",
        "--raw-tokens",
        "1500",
        "--refined-tokens",
        "700",
    ]
    command = [Path(sys.executable).with_name("fusedgpt"), "create", "a talk of two friends", *shape, *llm]
    command += [*limits, "--steps", "20", "--output-dir", tmp_path, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    folder = Path(json.loads(done.stdout)["model_path"])
    info = json.loads((folder / "generation_info.json").read_text())
    assert (info["generation_method"], info["generation"]["model"]) == ("openai", server.model)
    assert info["generation"]["tokens"] >= 1500
    assert info["refinement"]["kept_tokens"] >= 300
    print(json.dumps({k: info[k] for k in ("generation", "refinement", "training")}, indent=1))
