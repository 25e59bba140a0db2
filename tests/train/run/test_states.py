"""The states of a run directory and the moves between them: none loses what is newer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_runs import config, counting, outcome

from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import ConfigError
from fusedgpt.train.loop import distributed, trainer
from fusedgpt.train.report.progress import Monitor
from fusedgpt.train.run import directory
from fusedgpt.train.run.checkpoint import Checkpoint, CheckpointStore, load_checkpoint
from fusedgpt.train.run.directory import RunFinished, find_run, open_run, read_run, run_path

TRAIN = {"command": "train"}


class Notes(Monitor):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def trained(run_dir: Path, *, resume: Path | None = None, finish: bool = True, **changes: Any) -> list[str]:
    """What a run, or the rest of one, tells the user."""
    settings, monitor = config(**{"save_every": "2", "keep_last": 9, "steps": 8, **changes}), Notes()
    with open_run(run_dir, settings, TRAIN, resume=resume) as run:
        trainer.train(GPT(settings.model.gpt_config(61), seed=5), counting(), settings.train, monitor, run)
        if finish:
            run.finish({"model_path": "models/tiny"})
    return monitor.notes


def steps(run_dir: Path) -> list[int]:
    return CheckpointStore(run_dir / "checkpoints", keep_last=1).steps()


def last_metrics(run_dir: Path) -> int:
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    return int(json.loads(rows[-1])["step"])


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- a resume that is refused ---


@pytest.mark.parametrize("changes", [{"n_embd": 24}, {"n_layer": 1}, {"seed": 99}, {"device": "cuda:77"}])
def test_a_refused_resume_changes_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    run_dir = tmp_path / "run"
    trained(run_dir, finish=False, steps=4)
    before = content(run_dir)
    with pytest.raises(ValueError, match=r"another seed|expected|unexpected tensors|--device cuda:77"):
        trained(run_dir, resume=run_dir, **changes)
    assert content(run_dir) == before
    trained(run_dir, resume=run_dir)
    assert steps(run_dir)[-1] == 8


def test_a_new_run_is_refused_where_one_stopped_before_its_first_save(tmp_path: Path) -> None:
    trained(tmp_path / "run", finish=False, steps=4)
    shutil.rmtree(tmp_path / "run/checkpoints")
    before = content(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run: go on with --resume"):
        trained(tmp_path / "run")
    assert content(tmp_path / "run") == before
    assert (
        "has no checkpoint yet: it starts from the beginning"
        in trained(tmp_path / "run", resume=tmp_path / "run")[0]
    )


# --- going back ---


def test_going_back_moves_what_is_later_to_a_run_of_its_own(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    trained(run_dir)
    whole = outcome(run_dir)
    notes = trained(run_dir, resume=run_dir / "checkpoints/step-00000002", steps=5, finish=False)
    branch = run_dir / "abandoned/after-step-00000002"
    assert f"moved 3 later checkpoints to {branch}; --resume {branch} goes on from there" in notes
    assert steps(run_dir) == [2, 4, 5]
    assert last_metrics(run_dir) == 5
    assert steps(branch) == [4, 6, 8]
    assert last_metrics(branch) == 8
    assert outcome(branch)[0] == whole[0]
    trained(run_dir, resume=run_dir)  # plain: from where the new branch stopped
    assert f"resuming after step 8 of 9 from {branch}" in trained(branch, resume=branch, steps=9)
    trained(run_dir, resume=run_dir / "checkpoints/step-00000002", steps=3)
    assert steps(run_dir / "abandoned/after-step-00000002_2") == [4, 5, 6, 8]


def test_damaged_checkpoints_are_moved_aside_too(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    trained(run_dir, finish=False)
    for step in (6, 8):
        (run_dir / f"checkpoints/step-{step:08d}/model.safetensors").write_bytes(b"?")
    notes = trained(run_dir, resume=run_dir)
    assert any("step-00000008/model.safetensors is damaged" in note for note in notes)
    assert any("moved 2 later checkpoints to" in note for note in notes)
    assert len(list((run_dir / "abandoned/after-step-00000004/checkpoints").iterdir())) == 2


def test_a_move_that_fails_half_way_has_not_gone_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    trained(run_dir, finish=False)
    rename, moved = os.rename, 0

    def failing(source: Any, target: Any) -> None:
        nonlocal moved
        moved += "abandoned" in str(target)
        if moved == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="cannot move the checkpoints after step 2"):
            trained(run_dir, resume=run_dir / "checkpoints/step-00000002")
    assert steps(run_dir) == [2, 6, 8]
    assert any("resuming after step 8" in note for note in trained(run_dir, resume=run_dir, steps=9))


# --- a finished run ---


@pytest.mark.parametrize("keep_last", [0, 1])
def test_a_finished_run_is_protected(tmp_path: Path, keep_last: int) -> None:
    run_dir = tmp_path / "run"
    trained(run_dir, keep_last=keep_last)
    before = content(run_dir)
    with pytest.raises(ConfigError, match="holds a run"):
        trained(run_dir)
    with pytest.raises(RunFinished, match=r"is finished .*its model folder is models/tiny") as error:
        trained(run_dir, resume=run_dir, keep_last=keep_last)
    assert error.value.result == {"model_path": "models/tiny"}
    if keep_last:
        assert "step 8 of 10" in trained(run_dir, resume=run_dir, steps=10)[0]
        assert read_run(run_dir)[0]["result"]
        return
    assert content(run_dir) == before
    with pytest.raises(RunFinished, match="--init-from models/tiny"):
        trained(run_dir, resume=run_dir, keep_last=0, steps=10)


def test_a_run_that_goes_on_is_not_finished_any_more(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    trained(tmp_path / "run", resume=tmp_path / "run", steps=10, finish=False)
    assert "result" not in read_run(tmp_path / "run")[0]


def test_one_that_stopped_early_is_finished(tmp_path: Path) -> None:
    slow = {"eval_every": 1, "patience": 1, "min_improvement": 100.0, "steps": 20}
    trained(tmp_path / "run", **slow)
    with pytest.raises(RunFinished, match="give it more --steps or --patience"):
        trained(tmp_path / "run", resume=tmp_path / "run", **slow)


# --- saves that fail ---


def failing_saves(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> list[int]:
    """Let the saves fail whose number `fails`; returns the steps that were tried."""
    save, tried = CheckpointStore.save, list[int]()

    def full(self: CheckpointStore, checkpoint: Checkpoint) -> Path:
        tried.append(checkpoint.step)
        if fails(len(tried)):
            raise OSError("cannot save: No space left on device; free some space")
        return save(self, checkpoint)

    monkeypatch.setattr(CheckpointStore, "save", full)
    return tried


@pytest.mark.parametrize("log_every", [1, 50])
def test_one_failed_save_is_reported_and_the_next_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    failing_saves(monkeypatch, lambda n: n == 2)
    notes = trained(tmp_path / "run", log_every=log_every)
    told = "cannot save: No space left on device; free some space; training goes on and saves again later"
    assert notes.count(told) == 1
    assert steps(tmp_path / "run") == [2, 6, 8]


def test_three_failed_saves_are_followed_by_another_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing_saves(monkeypatch, lambda n: n <= 3)
    notes = trained(tmp_path / "run", steps=20)
    assert any("3 saves in a row failed, trying once more" in note for note in notes)
    assert tried[3] - tried[2] <= 1
    assert len(tried) == 11  # every second step, and this one


def test_a_failed_save_of_the_last_step_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = failing_saves(monkeypatch, lambda n: n == 2)
    trained(tmp_path / "run", steps=4)
    assert tried == [2, 4, 4]
    assert steps(tmp_path / "run") == [2, 4]


def test_a_run_that_cannot_be_saved_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = failing_saves(monkeypatch, lambda n: n > 1)
    with pytest.raises(OSError, match="No space left on device"):
        trained(tmp_path / "run", steps=100)
    assert len(tried) == 5
    assert steps(tmp_path / "run") == [2]


# --- space ---


def test_space_is_checked_for_checkpoints_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(
        tmp_path / "run", config(keep_last=2), TRAIN, resume=None, output_dir=tmp_path / "m"
    ) as run:
        for free, fits in [(349, False), (350, True)]:  # three checkpoints of 100 bytes, a model of 50
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
            if fits:
                run.check_space(100, model_bytes=50)
                continue
            message = r"m has 349 bytes free and needs 350; free some space or choose another --output-dir"
            with pytest.raises(OSError, match=message):
                run.check_space(100, model_bytes=50)


def test_a_run_that_fitted_is_not_refused_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path / "run", steps=4, keep_last=1)
    kept = sum(file.stat().st_size for file in (tmp_path / "run").glob("checkpoints/*/*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(1.5 * kept)))
    trained(tmp_path / "run", resume=tmp_path / "run", keep_last=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_a_checkpoint_is_known_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(distributed, "cast_parameters", lambda model, _: model.to(dtype))
    said = list[int]()
    monkeypatch.setattr(directory.Run, "check_space", lambda self, n_bytes, model_bytes: said.append(n_bytes))
    trained(tmp_path / "run", steps=10, eval_every=7)  # not validated after step 10: "best" has its own file
    files = (tmp_path / "run/checkpoints/step-00000010").glob("*.safetensors")
    assert sum(file.stat().st_size for file in files) == pytest.approx(said[0], rel=0.25)  # headers


# --- precision and other choices ---


def test_a_16_bit_checkpoint_goes_on_in_fp32_from_its_masters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:  # as on a GPU
        patch.setattr(distributed, "cast_parameters", lambda model, _: model.bfloat16())
        trained(run_dir, steps=4, precision="bf16")
    saved = load_checkpoint(run_dir / "checkpoints/step-00000004").tensors
    name = next(key for key in saved["model"] if saved["model"][key].ndim == 2 and "h.0" in key)
    master = saved["optimizer"][f"{name}.master"]
    assert not torch.equal(master, saved["model"][name].float())
    restored = dict[str, torch.Tensor]()
    begin = directory.Run.begin

    def look(self: directory.Run, **options: Any) -> None:
        restored.update(copied(dict(models[-1].named_parameters())))
        begin(self, **options)

    models = list[GPT]()
    real = trainer._prepare
    monkeypatch.setattr(trainer, "_prepare", lambda model, *rest: models.append(model) or real(model, *rest))
    monkeypatch.setattr(directory.Run, "begin", look)
    notes = trained(run_dir, resume=run_dir, steps=6)
    assert "the checkpoint was trained in bfloat16, the run goes on in float32" in notes
    assert torch.equal(restored[name], master)
    tensors = load_checkpoint(run_dir / "checkpoints/step-00000006").tensors
    assert {x.dtype for x in tensors["model"].values()} == {torch.float32}
    assert not [key for key in tensors["optimizer"] if key.endswith(".master")]

    with monkeypatch.context() as patch:  # and back
        patch.setattr(distributed, "cast_parameters", lambda model, _: model.bfloat16())
        masters = dict[str, torch.Tensor]()
        patch.setattr(
            trainer, "_choose_execution",
            lambda training, *_, **__: masters.update(copied(training.parameters())) or training.execution,
        )  # fmt: skip
        trained(run_dir, resume=run_dir, steps=7, precision="bf16")
    assert torch.equal(masters[name], tensors["model"][name])


def test_what_auto_chose_is_kept_by_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, chosen = tmp_path / "run", list[Any]()
    trained(run_dir, steps=4)
    state = load_checkpoint(run_dir / "checkpoints/step-00000004").state
    expected = {"device": "cpu", "precision": "float32", "compile": "off", "cuda_graphs": False}
    assert state["execution"] == expected
    monkeypatch.setattr(trainer, "choose_compile", lambda *_: "block")  # as fewer steps may let it
    real = trainer._choose_execution
    monkeypatch.setattr(
        trainer, "_choose_execution", lambda *a, **k: chosen.append(real(*a, **k)) or chosen[-1]
    )
    trained(run_dir, resume=run_dir, steps=5)
    assert chosen == [expected]


# --- finding runs ---


def test_auto_takes_the_newest_run_of_the_same_command_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, command in [
        ("a", {"command": "train", "data": ["/a"]}),
        ("b", {"command": "train", "data": ["/b"]}),
        ("c", {"command": "create", "prompt": "sea"}),
    ]:
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "run.json").write_text(json.dumps(command))
        Path("runs", name, "config.toml").write_text("")
        os.utime(Path("runs", name, "run.json"), (time.time(), time.time() + ord(name)))
    Path("runs/broken").mkdir()
    Path("runs/broken/run.json").write_text("{")
    Path("runs/dangling").symlink_to("nowhere")
    Path("runs/loop").symlink_to("loop")
    for given, name in [
        ({"command": "train", "data": ["/a"]}, "a"),
        ({"command": "train", "data": []}, "b"),
        ({"command": "train", "data": ["/c"]}, None),
        ({"command": "create", "prompt": None}, "c"),
        ({"command": "create", "prompt": "sea"}, "c"),
        ({"command": "create", "prompt": "land"}, None),
    ]:
        assert find_run("auto", None, given) == (name and Path("runs") / name)


def test_runs_of_one_second_have_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260101_000000")
    first, second = (run_path("12M", None, None, None) for _ in range(2))
    assert (first.name, second.name) == ("12m_20260101_000000", "12m_20260101_000000_2")


def test_the_loser_of_a_race_removes_nothing(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", config(), TRAIN, resume=None) as run:
        run.begin()
        before = content(tmp_path / "run")
        with (
            pytest.raises(ValueError, match="in use by process"),
            open_run(tmp_path / "run", config(), TRAIN, resume=None),
        ):
            pass
        assert content(tmp_path / "run") == before


def test_a_data_path_that_is_not_utf8_comes_back(tmp_path: Path) -> None:
    command = {"command": "train", "data": [os.fsdecode(b"/caf\xe9.txt")]}
    with open_run(tmp_path / "run", config(), command, resume=None) as run:
        run.begin()
    assert read_run(tmp_path / "run")[0]["data"] == command["data"]


def test_no_memory_names_the_options_that_save_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(trainer.Step, "__call__", full)
    with pytest.raises(
        trainer.OutOfMemory, match=r"CUDA out of memory: lower --batch-size .*--checkpointing"
    ):
        trained(tmp_path / "run")
