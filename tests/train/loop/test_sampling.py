"""Sampling during training changes nothing of it; a signal ends it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import config, counting, outcome

from fusedgpt.kernels.errors import InputError
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import byte_tokenizer, char_tokenizer
from fusedgpt.train.config import build_config
from fusedgpt.train.loop import sampling
from fusedgpt.train.loop.sampling import Sampler
from fusedgpt.train.loop.step import Step
from fusedgpt.train.loop.trainer import train
from fusedgpt.train.report.progress import Monitor
from fusedgpt.train.run.directory import open_run
from fusedgpt.train.run.signals import Stopped

SAMPLER = Sampler(tokenizer=byte_tokenizer(), prompts=["1 2", "0"], every=5, seed=0)


def run(run_dir: Path, sampler: Sampler | None, *, resume: Path | None = None, **changes: Any) -> Any:
    """The outcome of a tiny run."""
    torch.set_num_threads(1)
    settings = config(**{"steps": 30, "save_every": "10", **changes})
    with open_run(run_dir, settings, {"command": "train"}, resume=resume) as opened:
        model = GPT(settings.model.gpt_config(61), seed=5)
        train(model, counting(), settings.train, Monitor(quiet=True), opened, sampler=sampler)
    return outcome(run_dir)


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], x) for name, x in expected[1].items())
    assert found[2] == expected[2]


def sampled_steps(run_dir: Path) -> list[int]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["sample"].startswith(row["prompt"]) for row in rows if "sample" in row)
    return [row["step"] for row in rows if row.get("prompt") == "0"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_with_samples_is_equal_to_the_bit(tmp_path: Path, precision: str) -> None:
    expected = run(tmp_path / "without", None, precision=precision)
    assert_same(run(tmp_path / "with", SAMPLER, precision=precision), expected)
    assert sampled_steps(tmp_path / "with") == [5, 10, 15, 20, 25, 30]


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", ["on", "off"])
def test_on_a_gpu_too_with_and_without_graphs(tmp_path: Path, cuda_graphs: str) -> None:
    where = {"device": "cuda", "precision": "auto", "cuda_graphs": cuda_graphs, "deterministic": True}
    assert_same(run(tmp_path / "with", SAMPLER, **where), run(tmp_path / "without", None, **where))


def test_a_resume_samples_without_gap_or_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(tmp_path / "straight", SAMPLER)
    step, calls = Step.run, []

    def killed(self: Step, batch: Any) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(Step, "run", killed)
    with pytest.raises(Stopped, match="after step 17"):
        run(tmp_path / "run", SAMPLER)
    assert_same(run(tmp_path / "run", SAMPLER, resume=tmp_path / "run"), expected)
    assert sampled_steps(tmp_path / "run") == sampled_steps(tmp_path / "straight")


def test_sampling_leaves_the_model_and_random_states_alone() -> None:
    model = GPT(config().model.gpt_config(61), seed=5).train()
    before = {name: (x.clone(), x.stride()) for name, x in model.named_parameters()}
    random, dropout = torch.get_rng_state(), int(model.dropout_windows)
    texts = SAMPLER.texts(model)
    assert SAMPLER.texts(model) == texts
    assert {prompt: text[: len(prompt)] for prompt, text in texts.items()} == {"1 2": "1 2", "0": "0"}
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert int(model.dropout_windows) == dropout
    for name, x in model.named_parameters():
        assert torch.equal(x, before[name][0])
        assert x.stride() == before[name][1]
        assert x.requires_grad


def test_a_signal_ends_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60.0)

    monkeypatch.setattr(sampling, "sample_batch", endless)
    start = time.monotonic()
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 5; go on with --resume"):
        run(tmp_path / "run", SAMPLER)
    assert time.monotonic() - start < 30.0
    monkeypatch.undo()
    expected = run(tmp_path / "straight", None)
    assert_same(run(tmp_path / "run", SAMPLER, resume=tmp_path / "run"), expected)


def test_settings_make_a_sampler() -> None:
    assert Sampler.from_config(build_config({}), byte_tokenizer()) is None
    settings = build_config({"sample_every": 7, "sample_prompt": ["The", "A"], "seed": 3})
    sampler = Sampler.from_config(settings, byte_tokenizer())
    assert sampler is not None
    assert (sampler.prompts, sampler.every, sampler.seed) == (["The", "A"], 7, 3)
    with pytest.raises(InputError, match="--sample-prompt 'The': "):
        Sampler.from_config(settings, char_tokenizer("abc"))
