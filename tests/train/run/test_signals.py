"""A signal at any moment of a run: it is saved within a step, and a resume loses nothing (row 7)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import in_fresh_process, outcome, train_tiny

from fusedgpt.train import pipeline
from fusedgpt.train.config import build_config
from fusedgpt.train.loop import trainer, validation
from fusedgpt.train.loop.step import Step
from fusedgpt.train.pipeline import train_on_files
from fusedgpt.train.report import step_log as log
from fusedgpt.train.run import checkpoint
from fusedgpt.train.run.signals import Stopped, StopSignals

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


def kill_in_call(function: Callable[..., Any], number: int, call: int) -> Callable[..., Any]:
    """`function`, in whose `call`-th call the process gets a signal."""
    calls = []

    @wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # other threads: the main one must come to its handler
        return function(*args, **options)

    return wrapper


@pytest.fixture(autouse=True)
def not_ignored() -> Iterator[None]:
    """As in the foreground, whatever started the tests."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS if number != signal.SIGINT}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    run_dir = tmp_path_factory.mktemp("expected") / "run"
    in_fresh_process(train_tiny, run_dir, steps=30)
    return outcome(run_dir)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("owner", "name", "call", "step"),
    [
        (Step, "run", 5, 5),  # the step it came in is the last
        (Step, "run", 1, 1),
        (validation, "evaluate", 2, 14),  # cut short, and done at the resume
        (checkpoint.CheckpointStore, "save", 3, None),  # in the thread that saves
    ],
)
def test_a_signal_saves_and_a_resume_loses_nothing(
    tmp_path: Path,
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    owner: Any,
    name: str,
    call: int,
    step: int | None,
) -> None:
    handlers = [signal.getsignal(n) for n in SIGNALS]
    run_dir = tmp_path / "run"
    monkeypatch.setattr(owner, name, kill_in_call(getattr(owner, name), number, call))
    start = time.monotonic()
    with pytest.raises(Stopped, match=f"go on with --resume {run_dir}") as stopped:
        train_tiny(run_dir, steps=30, save_every="4")
    assert time.monotonic() - start < 30.0
    assert stopped.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    saved = checkpoint.CheckpointStore(run_dir / "checkpoints", keep_last=1).steps()
    assert step in (None, saved[-1])
    monkeypatch.undo()
    train_tiny(run_dir, resume=run_dir, steps=30, save_every="4")
    losses, tensors, state = outcome(run_dir)
    assert losses == expected[0]
    assert all(torch.equal(tensors[name], x) for name, x in expected[1].items())
    assert state == expected[2]


def test_a_signal_ends_a_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes minutes in C++ or in sleep, and has nothing to save yet."""

    def compile_for_ever(*_: Any, **__: Any) -> Any:
        def forward(*args: Any, **options: Any) -> None:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(60.0)

        return forward

    monkeypatch.setattr(torch, "compile", compile_for_ever)
    start = time.monotonic()
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 0: there was nothing to save yet"):
        train_tiny(tmp_path / "run", compile="model")
    assert time.monotonic() - start < 20.0


def test_under_nohup_a_closed_terminal_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_stops_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Step, "run", kill_in_call(Step.run, signal.SIGINT, 5))
    monkeypatch.setattr(log.TrainingLog, "add", kill_in_call(log.TrainingLog.add, signal.SIGINT, 5))
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "run")


def test_a_signal_in_the_samples_costs_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "sample_texts", kill_in_call(pipeline.sample_texts, signal.SIGTERM, 2))
    (tmp_path / "book.txt").write_text("The cat sat on the mat. " * 99)
    tiny = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "steps": 3, "tokenizer": "byte"}
    with pytest.raises(Stopped, match=f"the model folder is {tmp_path}/models/run"):
        train_on_files(
            [tmp_path / "book.txt"], build_config(tiny), tmp_path / "models", run_dir=tmp_path / "run"
        )
    (folder,) = (tmp_path / "models").iterdir()
    assert (folder / "model.safetensors").is_file()


def test_without_a_run_directory_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    from training_runs import config, counting

    from fusedgpt.model.gpt import GPT

    monkeypatch.setattr(Step, "run", kill_in_call(Step.run, signal.SIGTERM, 3))
    settings = config()
    with pytest.raises(Stopped, match="after step 3; nothing was saved, there is no run directory"):
        trainer.train(GPT(settings.model.gpt_config(61)), counting(), settings.train)


def test_in_another_thread_signals_are_left_alone() -> None:
    from training_runs import config, counting

    from fusedgpt.model.gpt import GPT

    settings = config(steps=2)
    losses: list[float] = []
    model = GPT(settings.model.gpt_config(61))
    work = threading.Thread(
        target=lambda: losses.append(trainer.train_model(model, counting(), settings.train))
    )
    work.start()
    work.join()
    assert len(losses) == 1
