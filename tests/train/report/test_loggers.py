"""TensorBoard, wandb and trackio: what they are handed, also across resumes, and how they fail."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import metrics_rows
import pytest
from metrics_rows import row, write

from fusedgpt.kernels.errors import InputError
from fusedgpt.train.report import loggers
from fusedgpt.train.report.loggers import TensorBoardSink, open_logger

Scalars = dict[str, list[tuple[int, float]]]


def scalars(folder: Path) -> Scalars:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_each_step_and_validation(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, resume_step=0)
    write(sink, range(1, 11))
    sink.step(replace(row(11), tokens_per_second=math.nan, mfu=math.nan))
    sink.evaluation(11, 2.0, None)
    sink.close()
    sink.close()
    shown = scalars(tmp_path)
    assert {tag: [step for step, _ in points] for tag, points in shown.items()} == {
        "train/loss": [*range(1, 12)],
        "train/grad_norm": [*range(1, 12)],
        "train/learning_rate": [*range(1, 12)],
        "throughput/tokens_per_second": [*range(1, 11)],
        "throughput/mfu": [*range(1, 11)],
        "eval/loss": [5, 10, 11],
        "eval/bits_per_byte": [5, 10],
    }
    assert shown["train/loss"][6] == (7, pytest.approx(7 / 3))
    assert shown["throughput/tokens_per_second"][0][1] == pytest.approx(1234.5678)


@pytest.mark.parametrize("resume_step", [0, 12])
def test_tensorboard_shows_what_a_resume_repeats_once(tmp_path: Path, resume_step: int) -> None:
    for start, end in ((0, 18), (resume_step, 25)):
        # a process each, as in a real resume: the order of the files comes from their names
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import time\n"
            "from fusedgpt.train.report.loggers import TensorBoardSink; from metrics_rows import write\n"
            f"sink = TensorBoardSink(Path(sys.argv[2]), resume_step={start})\n"
            f"write(sink, range({start} + 1, {end} + 1)); sink.close(); time.sleep(1)"
        )
        helpers = Path(metrics_rows.__file__).parent
        subprocess.run([sys.executable, "-c", code, str(helpers), str(tmp_path)], check=True)
    assert len(list(tmp_path.glob("events.*"))) == 2
    shown = scalars(tmp_path)
    assert [step for step, _ in shown["train/loss"]] == [*range(1, 26)]
    assert [step for step, _ in shown["eval/loss"]] == [5, 10, 15, 20, 25]


def test_tensorboard_shows_samples_as_they_are(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path, resume_step=0)
    sink.samples(5, {"": "# no\n*heading*", "The": "The 料理"})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.PluginTagToContent("text").keys() == {"samples/1", "samples/2"}
    shown = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    texts = {tag: (e.step, e.tensor_proto.string_val[0].decode()) for tag, (e,) in shown.items()}
    assert texts == {
        "samples/1": (5, "    # no\n    *heading*"),
        "samples/2": (5, "    The 料理"),
    }


def test_tensorboard_reads_memory_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "_memory", lambda: {"memory/peak_bytes": 3e9})
    sink = TensorBoardSink(tmp_path, resume_step=0)
    write(sink, range(1, 21))  # 0.12345 seconds each
    sink.close()
    assert scalars(tmp_path)["memory/peak_bytes"] == [(1, 3e9), (10, 3e9), (19, 3e9)]


@pytest.mark.gpu
def test_tensorboard_shows_the_peak_of_gpu_memory(tmp_path: Path) -> None:
    import torch

    torch.ones(2**20, device="cuda")
    sink = TensorBoardSink(tmp_path, resume_step=0)
    sink.step(row(1))
    sink.close()
    assert scalars(tmp_path)["memory/peak_bytes"][0][1] >= 2**22


class FakeRun:
    """A run of wandb or trackio that keeps what it is handed."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        values = dict(values)
        self.rows.append((values.pop("step") if step is None else step, values))

    def finish(self) -> None:
        print("finished")
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the library, with its name and its `runs`."""
    runs: list[FakeRun] = []

    def init(project: str, name: str, **options: Any) -> FakeRun:
        print("started")
        runs.append(FakeRun(project=project, name=name, **options))
        return runs[-1]

    def finish() -> None:
        runs[-1].finish()

    module = SimpleNamespace(
        init=init, finish=finish, Settings=dict, Html=str, Markdown=str, runs=runs, name=request.param
    )
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_logger_gets_scalars_and_samples(
    fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = open_logger(fake.name, tmp_path, {"train": {"steps": 9}}, resume_step=0)
    sink.step(replace(row(1), mfu=math.nan))
    sink.evaluation(1, 2.5, None)
    sink.samples(1, {"a/../b": "<b>bold</b>\n# x"})
    sink.close()
    sink.close()
    (run,) = fake.runs
    assert run.options["config"] == {"train": {"steps": 9}}
    scalars = {"train/loss": 1 / 3, "train/grad_norm": 1.5, "train/learning_rate": 3e-4}
    shown = {"wandb": "<pre>&lt;b&gt;bold&lt;/b&gt;\n# x</pre>", "trackio": "    <b>bold</b>\n    # x"}
    assert run.rows == [
        (1, {**scalars, "throughput/tokens_per_second": 1234.5678}),
        (1, {"eval/loss": 2.5}),
        (1, {"samples/1": shown[fake.name]}),
    ]
    assert run.finished == 1
    assert capsys.readouterr().out == ""  # which is for results


def test_a_resume_continues_the_same_run(fake: Any, tmp_path: Path) -> None:
    for folder, step in (("run", 0), ("run", 7), ("other/run", 0)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        open_logger(fake.name, tmp_path / folder, {}, resume_step=step)
    first, again, other = ((run.options["name"], run.options.get("id")) for run in fake.runs)
    assert first == again != other
    assert {run.options["resume"] for run in fake.runs} == {"allow"}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_without_its_library_the_extra_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"pip install 'fusedgpt\[{name}\]'"):
        open_logger(name, tmp_path, {}, resume_step=0)
    assert list(tmp_path.iterdir()) == []


def test_a_logger_that_cannot_start_says_why(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no account")

    monkeypatch.setattr(fake, "init", fail)
    with pytest.raises(InputError, match=f"--logger {fake.name}: no account"):
        open_logger(fake.name, tmp_path, {}, resume_step=0)


REAL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_loggers import open_logger, write
for start, end in ((0, 8), (6, 10)):
    sink = open_logger(sys.argv[2], Path(sys.argv[3]), {"steps": 9}, resume_step=start)
    write(sink, range(start + 1, end + 1))
    sink.samples(end, {"The": "The cat"})
    sink.close()
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_library_itself_takes_it_offline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    command = [sys.executable, "-c", REAL, str(Path(__file__).parent), name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    kept = {"wandb": "wandb/offline-run-*/*.wandb", "trackio": "trackio/*.db"}[name]
    assert len(list(tmp_path.glob(kept))) == {"wandb": 2, "trackio": 1}[name]  # W&B joins them in its sync
