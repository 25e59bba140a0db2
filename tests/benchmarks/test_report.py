"""The report's page, its comparisons and what is committed, on made-up results; nothing is measured here."""

from __future__ import annotations

import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import clock
from benchmarks.ceilings import Ceilings
from benchmarks.kernels import harness
from benchmarks.report import bench, page, record, runner, sections
from benchmarks.workloads import contenders, entrant, jobs, training_step
from fusedgpt.kernels import ops
from fusedgpt.kernels.cpu import linear
from fusedgpt.model.config import GPTConfig

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]
STAMP = {
    "device": "NVIDIA H200",
    "driver": "580.1",
    "python": "3.12.3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "commit": "0123456789abcdef",
    "clock_mhz": 1830,
    "temperature_c": 61,
    "time": "2026-11-23T10:00:00Z",
}


def step(contender: str, ms: float, *, B: int = 16, T: int = 1024, name: str = "step", **more: Any) -> Row:
    shares = [f"mfu_{count}_{of}" for count in ("palm", "causal") for of in ("measured", "datasheet")]
    row = {"suite": "train", "name": name, "shape": f"gpt2 {B} x {T}", "dtype": "bf16", "preset": "gpt2"}
    row |= {"contender": contender, "batch_size": B, "length": T, "ms": ms, "spread": 0.01, "gap": 1.9}
    row |= {"runs_ms": [ms, 1.005 * ms], "rate": 1e3 * B * T / ms, "peak_mb": 9000.0, "first_step_s": 9.5}
    return {**STAMP, **row, **dict.fromkeys(shares, 0.5), **more}


def kernel(op: str, contender: str, ms: float, *, flops: float = 1e10, bytes_: float = 1e8) -> Row:
    row = {"suite": "kernels", "name": op, "shape": "(65536, 768)", "dtype": "bf16", "contender": contender}
    row |= {"ms": ms, "spread": 0.02, "flops": flops, "bytes": bytes_, "floor_ms": ms / 2, "gap": 2.0}
    return {**STAMP, **row, "rate": bytes_ / ms * 1e-6, "unit": "GB/s", "peak_mb": 500.0}


def ceiling(tflops: float) -> Row:
    return {**STAMP, "suite": "ceilings", "dtype": "bf16", "tflops": tflops, "gbps": 4100.0}


def made_up() -> list[Row]:
    """A whole run on a GPU."""
    contenders = {"ours": 29.0, "plain-cudnn": 38.0, "plain-fa2": 41.0, "peer": 47.0, "peer-cudnn": 42.0}
    rows = [ceiling(790.0), *(step(name, ms) for name, ms in contenders.items())]
    for B, T in ((4, 1024), (64, 1024), (64, 256), (4, 4096)):
        rows += [step(name, contenders[name] * B * T / 16384, B=B, T=T) for name in ("ours", "plain-cudnn")]
    undone = {"attention": 8.0, "linear_cross_entropy": 5.1, "dropout_add_layer_norm": 2.2, "adamw": -0.1}
    rows.append(step("ours", 29.0, name="ablation"))
    rows += [step(f"ours-without-{op}", 29.0 + more, name="ablation") for op, more in undone.items()]
    for op in ("layer_norm both", "layer_norm forward", "dropout_add_layer_norm both", "adamw step"):
        rows += [kernel(op, "ours", 0.1), kernel(op, "eager", 0.4), kernel(op, "compiled", 0.13)]
    rows += [
        kernel("attention both", name, ms, flops=1e12, bytes_=8e8)
        for name, ms in (("ours", 2.0), ("sdpa_cudnn", 2.1))
    ]
    rows.append(step("peer", 31_400.0, name="first step"))
    rows.append({**kernel("save checkpoint", "ours", 900.0), "suite": "everyday", "shape": "gpt2"})
    job = {**kernel("shakespeare", "peer", 61_000.0), "suite": "jobs", "shape": "5000 steps"}
    rows.append({**job, "val_loss": 1.4712, "goal": 1.48, "goal_ms": 52_100.0})
    saved = step("ours-checkpointing-selective", 31.0, name="checkpointing", peak_mb=8000.0)
    rows.append({**saved, "predicted_mb": 7780.0, "predicted_ms": 30.5})
    return [*rows, ceiling(785.0)]


class Reader(HTMLParser):
    """Fails for tags that are not closed; keeps what the page asks for from outside and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_page_holds_every_figure_and_needs_no_other_file(tmp_path: Path) -> None:
    write(tmp_path / "results.jsonl", made_up())
    assert bench.render(tmp_path) == 0
    html, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    assert reader.links == []
    assert "url(" not in html
    assert "@import" not in html
    assert html.count("<pre>") == markdown.count("```text") == 3  # training, ablation, kernels
    for wanted in (
        "NVIDIA H200",
        "580.1",
        "2.11.0",
        "0123456789",
        "790 TFLOP/s",
        "564,966",
        "1.48: 52.1 s",
        "97.2%",
        "1.31x",
        "50.0%",
        "31.4 s",
    ):
        assert wanted in reader.text, wanted
        assert wanted in markdown, wanted
    assert "color-scheme: light dark" in html


def test_the_ratio_is_of_runs_side_by_side() -> None:
    """A machine that was half as fast for a while, in which one run of ours was cut."""
    ours = step("ours", 20.0, runs_ms=[10.0, 20.0])
    rows = [ours, step("plain", 15.0, runs_ms=[15.0, 30.0, 15.0]), step("plain-compiled", 12.0)]
    del rows[2]["runs_ms"]
    beside = sections.beside_ours(rows, "shape")
    assert [(row["contender"], sections.speed_up(row)) for row in beside] == [
        ("plain-compiled", "1.20x"),
        ("plain", "1.50x"),
        ("ours", ""),
    ]
    assert [row["ratio"] for row in sections.beside_ours(rows[1:], "shape")] == [None, None]


def test_a_fault_has_no_speed_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = {**STAMP, "suite": "train", "name": "step", "shape": "gpt2 4 x 64", "contender": "ours"}
    write(tmp_path / "results.jsonl", [*made_up(), {**fault, "fault": "no speed: losses 9.1, of plain 10.9"}])
    assert bench.render(tmp_path) == 1
    assert "NO SPEED step gpt2 4 x 64 ours: no speed: losses 9.1, of plain 10.9" in capsys.readouterr().out
    assert "losses 9.1, of plain 10.9" in (tmp_path / "report.html").read_text()
    assert "gpt2 4 x 64 bf16" not in (tmp_path / "report.md").read_text()


def test_two_runs_agree_within_the_noise_or_the_report_says_so() -> None:
    steady, loose = step("ours", 29.0), step("ours", 29.0, runs_ms=[28.0, 30.0])
    assert record.agrees(steady)
    assert not record.agrees(loose)
    assert record.agrees({**loose, "spread": 0.08})
    assert record.agrees({"ms": 5.0, "spread": None, "runs_ms": [4.6, 5.4]})  # measured once a run: 20%
    assert not record.agrees({"ms": 5.0, "spread": None, "runs_ms": [4.0, 6.0]})
    words = page.markdown(sections.sections([ceiling(790.0), steady, loose, ceiling(700.0)]))
    assert "0 of 1 measurements taken twice agree" in words
    assert "| step gpt2 16 x 1024 bf16 ours | 28 ms, 30 ms | 6.9% | 3.0% |" in words
    assert "| bf16 ceiling, start and end of the run | 790, 700 TFLOP/s | 11.4% | 3.0% |" in words


@pytest.mark.parametrize(
    ("now", "verdict"), [(29.8, "same"), (31.0, "slower"), (27.0, "faster"), (29.0, "same")]
)
def test_a_change_counts_beyond_the_noise(now: float, verdict: str) -> None:
    (change,) = record.compare([step("ours", 29.0)], [step("ours", now)])
    assert change.verdict == verdict
    (noisy,) = record.compare([step("ours", 29.0, spread=0.2)], [step("ours", now)])
    assert noisy.verdict == "same"


def test_compare_marks_regressions_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.jsonl", made_up())
    changed = {"ours": 1.5, "peer": 1.4}
    for row in (now := made_up()):
        row["ms"] = changed.get(row.get("contender", ""), 1.0) * row.get("ms", 0.0)
        row.pop("runs_ms", None)
    write(tmp_path / "results.jsonl", now)
    assert bench.render(tmp_path, old) == 1
    said = capsys.readouterr().out
    assert "REGRESSION train step gpt2 16 x 1024 bf16 ours: +50.0%" in said
    assert "peer" not in said  # slower too, but no regression of ours
    assert "REGRESSION" in (tmp_path / "report.html").read_text()
    assert bench.render(tmp_path, tmp_path / "results.jsonl") == 0
    other = write(tmp_path / "other.jsonl", [{**row, "device": "NVIDIA A100"} for row in made_up()])
    assert bench.render(tmp_path, other) == 2


def test_the_parts_for_a_gpu_name_contenders_and_presets_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for part in bench.all_parts(gpu=True, out=Path(), peer=ROOT, text=ROOT / "README.md"):
        lines += [command for command in part.commands if command[2] == "benchmarks.workloads.training_step"]
        for command in part.commands if part.name in ("jobs", "pipeline") else ():
            monkeypatch.setattr("sys.argv", command[2:])
            assert ("pipeline" in jobs.parse().names) == (part.name == "pipeline")
    assert len(lines) == 13
    for line in lines:
        monkeypatch.setattr("sys.argv", line[2:])
        assert training_step.parse(gpu=True).contenders[0] == "ours"


def test_one_fused_op_can_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "backend", lambda op, device, dtype: f"triton {op}")
    contenders.undo("dropout")
    found = {op: ops.backend(op, torch.device("cpu"), torch.float32) for op in ("dropout", "bias_gelu")}
    assert found == {"dropout": "reference", "bias_gelu": "triton bias_gelu"}


def test_every_run_leaves_a_figure_and_the_last_row_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """A time limit may end a contest after any run."""
    asked: list[str] = []

    def run(name: str) -> Row:
        asked.append(name)
        times = {"ours": [1.0, 1.2, 1.1], "flaky": [5.0] if asked.count("flaky") == 1 else None}.get(name)
        return {"times": times} if times else {"fault": "broke"}

    base = dict.fromkeys(record.KEY, "x")
    last = record.contest(base, ["ours", "wrong", "flaky"], run, lambda row, runs: {"n": len(runs)})
    assert asked == ["ours", "wrong", "flaky", "flaky", "ours"]
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["contender"] for row in rows] == asked
    assert [(row["ms"], row["n"]) for row in rows if row["contender"] == "ours"] == [(1.1, 1), (1.1, 2)]
    assert "runs_ms" in rows[-1]
    assert [row["contender"] for row in last if "fault" in row] == ["wrong", "flaky"]
    asked.clear()
    record.contest(base, ["ours", "theirs"], lambda name: asked.append(name) or {"times": [1.0]}, rounds=2)
    assert "".join(name[0] for name in asked) == "ottootto"
    assert {row["contender"] for row in record.timed(rows).values()} == {"ours"}  # flaky lost its figure


def test_the_interval_of_a_median_holds_it_in_95_of_100_samples() -> None:
    assert record.median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == []
    assert record.median_interval([6.0, 1.0, 2.0, 5.0, 4.0, 3.0]) == [1.0, 6.0]
    assert record.median_interval(range(1, 101)) == [40, 61]  # the ranks in the tables
    draws = np.random.default_rng(0).exponential(size=(2000, 30))
    intervals = [record.median_interval(draw.tolist()) for draw in draws]
    held = fmean(low <= math.log(2) <= high for low, high in intervals)
    assert 0.95 <= held < 0.98
    assert "29 (28.9 to 29.3)" in page.markdown(
        sections.sections([step("ours", 29.0, interval=[28.9, 29.3])])
    )


def test_a_contender_whose_process_dies_or_hangs_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"precision": "fp32", "batch_size": 2, "length": 16, "dropout": 0.0, "peer": None}
    one = entrant.Entrant("ours", entrant.Point(preset="toy", **shape))
    assert len(one.answer()["losses"]) == 2
    assert len(one.time(4)["times"]) == 4
    monkeypatch.setattr(entrant, "PATIENCE", 0)
    assert one.time(2)["fault"] == "nothing came from its process in 0 s"
    one.close()
    monkeypatch.setattr(entrant, "PATIENCE", 60)
    while "times" in (row := one.time(2)):
        pass  # what it had sent before
    assert row["fault"] == "its process ended with exit code -9"


def test_a_contender_that_is_never_ready_costs_only_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those before it have their figures by then: a time limit may end the wait."""
    seen: list[str] = []

    class Stub:
        def __init__(self, name: str, point: entrant.Point) -> None:
            self.name, self.pipe = name, SimpleNamespace(poll=lambda seconds: self.name != "peer")

        def answer(self) -> Row:
            seen.append(self.name)
            hangs = self.name == "peer"
            return {"fault": "hangs"} if hangs else {"losses": [4.0, 3.9], "first_step_s": 1.0}

        def time(self, steps: int) -> Row:
            return {"times": [1.0] * steps, "peak_mb": 1.0} if self.name == "ours" else {"fault": "broke"}

        def close(self) -> None:
            seen.append(f"end of {self.name}")

    monkeypatch.setattr(training_step, "Entrant", Stub)
    monkeypatch.setattr(training_step, "measure_ceilings", lambda dtype: Ceilings(tflops=1.0, gbps=1.0))
    shape = {"precision": "fp32", "batch_size": 2, "length": 16, "dropout": 0.0, "peer": ROOT}
    point = entrant.Point(preset="toy", **shape)
    training_step.compare(["ours", "peer", "plain"], point, 3)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["contender"], "ms" in row) for row in rows] == [
        ("ours", True),
        ("peer", False),
        ("plain", False),
        ("ours", True),
    ]
    assert seen == ["plain", "ours", "peer", "end of plain", "end of peer", "end of ours"]


def test_steps_that_do_not_lower_the_loss_have_no_speed() -> None:
    first = {"losses": [4.0, 3.9]}
    assert entrant.stopped_learning(lambda: torch.tensor(3.5), first) == {}
    for value in (4.1, math.nan):
        assert "no speed" in entrant.stopped_learning(lambda x=value: torch.tensor(x), first)["fault"]


def test_a_result_that_does_not_follow_its_inputs_has_no_speed() -> None:
    """As of a CUDA graph whose kernel remembers what it has seen."""
    x = torch.randn(1, 3)
    right = (clock.nothing, lambda _: 2 * x)
    assert harness.stale(clock.Timed(right), [right], [{"x": x}]) == ""
    seen = 2 * x
    timed = clock.Timed(right, (clock.nothing, lambda _: seen))
    assert "no speed: after the timing" in harness.stale(timed, [right, right], [{"x": x}])


def test_the_inputs_that_take_turns_have_other_values() -> None:
    """Also of a batch of one, and where a common shift would change no product."""
    inputs = {"hidden": torch.randn(1, 256, requires_grad=True), "weight": torch.randn(4, 256)}
    first, second = (x["hidden"] @ x["weight"].T for x in (inputs, harness.shifted(inputs, 1)))
    assert (first - second).norm() > 0.3 * first.norm()
    assert [x.requires_grad for x in harness.shifted(inputs, 1).values()] == [True, False]


def test_the_products_of_a_step_are_all_and_need_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "USES_ONEDNN", False)  # whose products torch does not count
    config, (B, T) = entrant.TOY, (2, 32)
    batch = contenders.tokens(B, T, config.vocab_size)
    loss, step, model = contenders.build("products", config, batch, "fp32", None)
    before = model.wte.weight.clone()
    with FlopCounterMode(display=False) as counter:
        step()
    weights = 12 * config.n_layer * config.n_embd**2 + config.padded_vocab_size * config.n_embd
    assert counter.get_total_flops() == B * T * (6 * weights + 12 * config.n_layer * T * config.n_embd)
    assert not torch.equal(model.wte.weight, before)
    first = {"losses": [None, None], "first_step_s": 1.0}
    assert training_step.judged(first, {"losses": [4.0, 3.9]}, "fp32")["ms"] == 1000.0
    assert loss is None
    assert entrant.stopped_learning(loss, first) == {}
    assert "products" not in contenders.names(gpu=True, peer=True)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_is_a_contender_with_the_same_step(mode: str) -> None:
    batch = contenders.tokens(2, 32, entrant.TOY.vocab_size)
    losses = []
    for name in ("ours", f"ours-checkpointing-{mode}"):
        assert name in contenders.names(gpu=False, peer=False)
        loss, step, model = contenders.build(name, entrant.TOY, batch, "fp32", None)
        step()
        losses.append(loss().item())
        recomputes = any("forward" in vars(module) for module in model.modules())
        assert recomputes is (name != "ours")
    assert losses[0] == losses[1]


def test_results_are_kept_as_they_come_and_a_cut_is_no_failure(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    slow = f"""
import json, time
print(json.dumps({{"suite": "train", "ms": 1.0}}), flush=True)
while '"ms"' not in open({str(results)!r}).read(): time.sleep(0.01)
print(json.dumps({{"suite": "train", "ms": 2.0}}), flush=True)
time.sleep(60)
"""
    results.touch()
    parts = {
        "cut": ([sys.executable, "-c", slow], "cut", "2 figures"),
        "empty": ([sys.executable, "-c", "import time; time.sleep(60)"], "TIMEOUT", "KeyboardInterrupt"),
        "wrong": (
            [sys.executable, "-c", 'print(\'{"suite": "train", "fault": "x"}\'); exit(1)'],
            "FAIL",
            "0 figures",
        ),
    }
    for name, (command, verdict, line) in parts.items():
        part = runner.Part(name=name, seconds=1, commands=[command], may_be_cut=True)
        row = runner.run_part(part, tmp_path, 3.0)
        assert row["verdict"] == verdict
        assert line in row["line"]
    assert [row["part"] for row in map(json.loads, results.read_text().splitlines())] == [
        "cut",
        "cut",
        "wrong",
    ]


def test_what_was_cut_short_is_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "results.jsonl", [step("ours", 29.0), {"part": "train", "verdict": "pass"}])
    file.write_text(file.read_text() + '{"suite": "train", "na')
    assert [row["contender"] for row in record.read(file)] == ["ours"]


def test_the_documents_show_the_newest_committed_results() -> None:
    """If this fails: python -m benchmarks.report.bench --docs"""
    for path, block in bench.doc_blocks().items():
        text = path.read_text()
        assert bench.with_block(text, block) == text, path.name


def test_committed_results_are_stamped_and_lie_in_their_device_s_folder() -> None:
    for file in bench.RESULTS.rglob("*.jsonl"):
        rows = record.read(file)
        assert rows
        for row in rows:
            assert {"device", "driver", "torch", "commit", "time"} <= set(row)
            assert bench.slug(row["device"]) == file.parent.name


def test_a_rival_may_have_our_malloc_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(contenders, "keep_freed_memory", lambda: given.append("settings"))
    monkeypatch.setattr(contenders, "plain", lambda *_, compiled: given.append(f"plain, {compiled=}"))
    for name in ("plain", "plain-kept-memory", "plain-compiled"):
        contenders.build(name, GPTConfig(), (torch.ones(1), torch.ones(1)), "fp32", None)
    assert given == ["plain, compiled=False", "settings", "plain, compiled=False", "plain, compiled=True"]
    assert "peer-kept-memory" in contenders.names(gpu=False, peer=True)
    assert not any("kept-memory" in name for name in contenders.names(gpu=True, peer=True))
