"""scripts/gpu_check: parts that fail, hang or leave children behind, the time in all, and no GPU at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.report import bench, gpu_check, gpu_pytest, runner
from fusedgpt.kernels.tools import cases

ROOT = Path(__file__).parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def alive(pid: int) -> bool:
    """Whether the process runs; one that is only waited for does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_failure_stops_nothing_and_decides_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = runner.Part(name="good", seconds=1, commands=[python("print('3 passed')")])
    bad = runner.Part(
        name="bad", seconds=1, commands=[python("print('on it'); raise SystemExit('2 failed')")]
    )
    none = runner.Part(name="none", seconds=1, commands=[])
    assert runner.run_parts([bad, none, good], tmp_path, 20) == 1
    assert [(row["part"], row["verdict"]) for row in rows(tmp_path)] == [
        ("bad", "FAIL"),
        ("none", "skip"),
        ("good", "pass"),
    ]
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert capsys.readouterr().out.splitlines()[-3:] == summary
    assert [line.split()[-2:] for line in summary] == [["2", "failed"], ["run", "here"], ["3", "passed"]]
    log = (tmp_path / "log.txt").read_text()
    assert "=== bad, exit code 1" in log
    assert "on it\n2 failed\n" in log
    assert runner.run_parts([none, good], tmp_path, 20) == 0


def test_a_command_that_dies_costs_only_itself(tmp_path: Path) -> None:
    """As by abort() in a destructor after a sticky CUDA error: figures before, beside and after it stay."""
    figure = "print('{\"figure\": 1}', flush=True)"
    dies = [python(f"{figure}; import os; os.abort()"), python(figure)]
    parts = [
        runner.Part(name="dies", seconds=1, commands=dies),
        runner.Part(name="after", seconds=1, commands=[python(figure)]),
    ]
    assert runner.run_parts(parts, tmp_path, 20) == 1
    kept = [(row["part"], row.get("verdict", row.get("figure"))) for row in rows(tmp_path)]
    assert kept == [("dies", 1), ("dies", 1), ("dies", "FAIL"), ("after", 1), ("after", "pass")]
    assert "1 of 2 commands passed" in (tmp_path / "summary.txt").read_text()


def test_a_part_that_overruns_is_killed_with_its_children_and_the_rest_runs(tmp_path: Path) -> None:
    """It ignores SIGINT, as a process that waits for a hung GPU does."""
    pids = tmp_path / "pids"
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    hang = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", {child!r}])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
print('{{"figure": 1}}', flush=True)
time.sleep(60)
"""
    parts = [
        runner.Part(name="hangs", seconds=1, commands=[python(hang)]),
        runner.Part(name="after", seconds=2, commands=[python("print('fine')")]),
    ]
    start = time.monotonic()
    assert runner.run_parts(parts, tmp_path, 6) == 1
    assert time.monotonic() - start < 6
    assert [row.get("verdict") for row in rows(tmp_path)] == [None, "TIMEOUT", "pass"]
    assert rows(tmp_path)[0] == {"part": "hangs", "figure": 1}
    assert not any(alive(int(pid)) for pid in pids.read_text().split())


def test_what_a_command_leaves_running_ends_with_it(tmp_path: Path) -> None:
    leaves = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)"
    part = runner.Part(name="leaves", seconds=1, commands=[python(leaves)])
    outcome = runner.run_part(part, tmp_path, 10)
    assert outcome["verdict"] == "pass"
    time.sleep(0.1)
    assert not alive(int(outcome["line"]))


def test_an_interrupted_command_may_still_write_what_it_has(tmp_path: Path) -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('1 of 9 done')"
    part = runner.Part(name="slow", seconds=1, commands=[python(code)])
    outcome = runner.run_part(part, tmp_path, 2)
    assert outcome == {
        "part": "slow",
        "verdict": "TIMEOUT",
        "seconds": outcome["seconds"],
        "line": "1 of 9 done",
    }


def test_commands_of_a_part_run_at_once_and_keep_their_rows(tmp_path: Path) -> None:
    """Each waits until the other has begun; the one after them finds their rows already written."""
    meet = """
import json, pathlib, sys, time
here, there = (pathlib.Path(sys.argv[1]) / name for name in sys.argv[2:])
here.touch()
while not there.exists(): time.sleep(0.01)
print(json.dumps([{"op": here.name, "dtype": "fp32", "shape": "", "direction": "", "output": "", "error": 1.0,
                   "limit": None, "exception": "boom", "ok": here.name == "a"}]))
"""
    look = "import os; print('results', open(os.environ['BENCHMARK_RESULTS']).read().count('dtype'))"
    pair = [[*python(meet), str(tmp_path), *names] for names in (("a", "b"), ("b", "a"))]
    parts = [
        runner.Part(name="check", seconds=1, commands=pair, jobs=2),
        runner.Part(name="look", seconds=1, commands=[python(look)]),
    ]
    runner.run_parts(parts, tmp_path, 20)
    assert {row["op"] for row in rows(tmp_path) if "op" in row} == {"a", "b"}
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert summary[0].endswith("1 of 2 findings ok; 2 of 2 commands passed")
    assert summary[1].endswith("results 2")
    assert "boom" in (tmp_path / "log.txt").read_text()


def test_a_part_without_commands_takes_no_time_from_the_others(tmp_path: Path) -> None:
    none = runner.Part(name="none", seconds=1000, commands=[])
    command = [*python("import sys; print(sys.argv[1])"), "{minutes}"]
    part = runner.Part(name="told", seconds=1, commands=[command])
    runner.run_parts([none, part, none], tmp_path, 60)
    assert rows(tmp_path)[1]["line"] == f"{0.8 * 57 / 60:.2f}"


def test_commands_that_never_began_are_no_pass(tmp_path: Path) -> None:
    part = runner.Part(name="check", seconds=1, commands=[python("print('begun')")])
    outcome = runner.run_part(part, tmp_path, 0.0)
    assert (outcome["verdict"], outcome["line"]) == ("TIMEOUT", "no time left")


def test_an_output_is_no_file_in_the_folder(tmp_path: Path) -> None:
    """Few files may come back from a borrowed machine, also from a run that is killed."""
    look = "import os, sys; print(*sorted(os.listdir(sys.argv[1])))"
    part = runner.Part(name="look", seconds=1, commands=[[*python(look), str(tmp_path)]])
    assert runner.run_part(part, tmp_path, 10)["line"] == "results.jsonl"


def test_children_compile_in_one_process_into_one_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in runner.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    code = "import os; print(os.environ['TORCHINDUCTOR_COMPILE_THREADS'], os.environ['TRITON_CACHE_DIR'])"
    part = runner.Part(name="look", seconds=1, commands=[python(code)])
    assert runner.run_part(part, tmp_path, 10)["line"] == f"1 {Path.home() / '.triton' / 'cache'}"


def test_the_sets_name_parts_and_fit_the_time_they_are_for() -> None:
    parts = {part.name: part for part in gpu_check.all_parts(Path(), gpu=True, peer=ROOT)}
    for name in ("first", "second"):
        chosen = [parts[part] for part in bench.PARTS["sets"][name]]
        assert 300 <= sum(part.seconds for part in chosen) <= 390  # --minutes 6 and 6.5 in README.md
    compiled = [part for part in parts.values() if part.name.startswith("compile")]
    for command in (command for part in compiled for command in part.commands):
        assert ("--compile-only" in command) or command[-2:] == ["--steps", "0"]
    kernels = [[*part.commands] for part in parts.values() if part.name.startswith("kernels")]
    assert all(sum("test_bench" in word for word in command) == 1 for part in kernels for command in part)


def test_tune_writes_where_the_parts_after_it_look(tmp_path: Path) -> None:
    before, tune, after = parts = [
        runner.Part(name=name, seconds=1, commands=[], environment={"A": "1"}) for name in ("a", "tune", "b")
    ]
    tuned = {"A": "1", "FUSEDGPT_TUNING": str(tmp_path / "tuning.json")}
    assert gpu_check.with_tuned_tiles(parts, tmp_path) == [
        before,
        replace(tune, environment=tuned),
        replace(after, environment=tuned),
    ]
    assert gpu_check.with_tuned_tiles([before, after], tmp_path) == [before, after]


def test_consan_and_the_sanitizer_look_at_every_op_and_their_finding_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\necho "$5 $8 $PYTORCH_NO_CUDA_MEMORY_CACHING: 1 error"; exit "$2"\n')
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    parts = {part.name: part for part in gpu_check.all_parts(Path(), gpu=True)}
    consan, sanitized = parts["consan"], parts["sanitizer"]
    assert consan.environment == {"TRITON_INSTRUMENTATION_MODE": "consan"}
    checks = [command[-4:] for command in consan.commands]
    assert {tuple(command[:3]) for command in checks} == {
        ("-m", "benchmarks.report.gpu_check", "--small-check")
    }
    ops = {op for command in parts["check"].commands for flag, op in pairwise(command) if flag == "--op"}
    assert {name.split()[0] for *_, name in checks} == ops
    assert len({(*command,) for command in checks}) == len(cases.cases(torch.device("cpu")))
    assert [(command[4], command[-4:]) for command in sanitized.commands] == [
        (tool, command) for tool in ("memcheck", "racecheck") for command in checks
    ]
    one = replace(sanitized, commands=sanitized.commands[:1])
    outcome = runner.run_part(one, tmp_path, 10)
    assert (outcome["verdict"], outcome["line"]) == ("FAIL", f"{sys.executable} --small-check 1: 1 error")


def test_the_gpu_tests_are_those_of_a_process_for_every_slice_of_a_file() -> None:
    files = gpu_check.files_with_gpu_tests()
    assert ROOT / "tests" / "kernels" / "test_attention.py" in files
    assert Path(__file__) not in files
    commands = gpu_check.by_file("gpu", files)
    assert len({(*command[-3:],) for command in commands}) == len(commands) == bench.SLICES * len(files)


def test_slices_are_all_tests_once_and_one_may_be_empty() -> None:
    seen: list[str] = []
    for i in range(4):
        items: list[Any] = ["a", "b", "c"]
        config: Any = SimpleNamespace(getoption={"--slice": f"{i}/4"}.get)
        gpu_pytest.pytest_collection_modifyitems(config, items)
        seen += items
    assert sorted(seen) == ["a", "b", "c"]
    session: Any = SimpleNamespace(exitstatus=None)
    gpu_pytest.pytest_sessionfinish(session, pytest.ExitCode.NO_TESTS_COLLECTED)
    assert session.exitstatus == pytest.ExitCode.OK


def test_a_broken_cuda_context_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    report = pytest.TestReport("tests/x.py::test_y", ("", 0, ""), {}, "failed", None, "teardown")
    gpu_pytest.pytest_runtest_logreport(report)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(pytest.exit.Exception, match=r"tests/x.py::test_y has broken the CUDA context"):
        gpu_pytest.pytest_runtest_logreport(report)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    script = [ROOT / "scripts" / "gpu_check", "--out", tmp_path / "out", "--minutes", "1"]
    done = subprocess.run(
        script, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}, cwd="/"
    )
    assert done.returncode == 2
    assert done.stderr == "gpu_check: no CUDA GPU; --parts here: environment, check\n"
    assert not (tmp_path / "out").exists()


def test_the_environment_part_runs_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.report.gpu_check", "--out", tmp_path, "--minutes", "0.5"]
    done = subprocess.run([*command, "--parts", "environment"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    (doctor,) = (row for row in rows(tmp_path) if "ops" in row)
    assert "attention" in doctor["ops"]
