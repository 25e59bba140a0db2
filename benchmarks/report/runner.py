"""Runs the parts of bench.py and gpu_check.py: processes with time limits, their rows and verdicts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.report.record import ROOT, Row, gpu_state, json_rows

GRACE, RESERVE = 10.0, 3.0  # seconds from SIGINT to SIGKILL, and for the summary
# Inductor's pool of compilers may hang for minutes at exit (pytorch #162199). Inductor also moves Triton's
# cache in the middle of a process, unless it is told where it is.
ENVIRONMENT = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TRITON_CACHE_DIR": str(Path.home() / ".triton" / "cache"),
}
_WRITTEN = ("results.jsonl", "log.txt", "report.html", "report.md", "summary.txt")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Commands that pass if all of them exit with 0; skipped if there are none."""

    name: str
    seconds: float  # what it needs; the time left is divided as the needs of the parts to come
    commands: list[list[str]]
    jobs: int = 1  # how many run in parallel
    may_be_cut: bool = False  # running out of time is no failure if there are results by then
    environment: dict[str, str] = field(default_factory=dict)


class Command:
    """One running command of a part, in a process group of its own."""

    def __init__(self, part: Part, index: int, out: Path, seconds: float) -> None:
        self.part, self.out, self.stopped, self.finished = part, out, False, False
        self.rows: list[Row] = []
        self.began = time.monotonic()
        self.read = 0  # bytes of the output that were harvested
        minutes = f"{0.8 * seconds / 60 / len(part.commands):.2f}"  # for one that ends by itself
        self.arguments = [a.replace("{minutes}", minutes) for a in part.commands[index]]
        # Not in DIR, which holds only what is to be kept. Closed by `finish`.
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        extra = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "BENCHMARK_RESULTS": str(out / "results.jsonl")}
        self.process = subprocess.Popen(
            self.arguments,
            cwd=ROOT,
            env={**ENVIRONMENT, **os.environ, **extra, **part.environment},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell's background job ignores SIGINT, and its children would inherit that.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def signal_group(self, sign: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, sign)

    def enforce(self, now: float, interrupt: float, end: float) -> None:
        """Ask the command to stop, so that pytest still writes what it has; after `end` kill it."""
        if now > end:
            self.signal_group(signal.SIGKILL)
        elif now > interrupt and not self.stopped:
            self.signal_group(signal.SIGINT)
        self.stopped = self.stopped or now > interrupt

    def text_from(self, start: int) -> bytes:
        """The output so far, read without moving the offset at which the command writes."""
        file = self.output.fileno()
        return os.pread(file, os.fstat(file).st_size - start, start)

    def harvest(self, *, ended: bool = False) -> None:
        """Keep as rows the whole lines of JSON that the command has printed since."""
        new = self.text_from(self.read)
        new = new if ended else new[: new.rfind(b"\n") + 1]
        self.read += len(new)
        rows = json_rows(new.decode(errors="replace"))
        append(self.out / "results.jsonl", ({"part": self.part.name, **row} for row in rows))
        self.rows += rows

    def finish(self) -> None:
        """End what the command has left running, log its output and keep its last rows."""
        self.signal_group(signal.SIGKILL)
        returned = self.process.poll()
        self.code = -signal.SIGKILL if returned is None else returned
        self.harvest(ended=True)
        text = self.text_from(0).decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        self.last_line = lines[-1].strip(" =")[:150] if lines else f"exit code {self.code}"
        with (self.out / "log.txt").open("a") as log:
            how = f"{self.part.name}, exit code {self.code}, {time.monotonic() - self.began:.1f} s"
            log.write(f"\n=== {how}: {' '.join(self.arguments)}\n{text}")
        self.output.close()
        self.finished = True


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add JSON lines to a file that other processes add to as well."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("a") as file:
        file.write(text)


def run_part(part: Part, out: Path, seconds: float) -> Row:
    """Run the part's commands, `jobs` in parallel, and stop them after `seconds`; its row of the summary."""
    start = now = time.monotonic()
    end, interrupt = start + seconds, start + seconds - min(GRACE, seconds / 4)
    results = out / "results.jsonl"
    results.touch()
    before = results.stat().st_size
    begun: list[Command] = []
    running: list[Command] = []
    try:
        while now < end + 1.0:  # a process that waits for a hung GPU outlives SIGKILL
            while now < interrupt and len(running) < part.jobs and len(begun) < len(part.commands):
                begun.append(Command(part, len(begun), out, seconds))
                running.append(begun[-1])
            if not running:
                break
            time.sleep(0.05)
            now = time.monotonic()
            for command in running:
                command.harvest()
                command.enforce(now, interrupt, end)
                if command.process.poll() is not None:
                    command.finish()
            running = [command for command in running if not command.finished]
    finally:
        for command in begun:
            if not command.finished:
                command.finish()
    return judge(part, begun, now - start, has_results=results.stat().st_size > before)


def judge(part: Part, commands: Sequence[Command], seconds: float, *, has_results: bool) -> Row:
    """The row of the summary: verdict, counts, and the last line of the first command that failed."""
    rows = [row for command in commands for row in command.rows]
    failed = [command for command in commands if command.code or command.stopped]
    late = len(commands) < len(part.commands) or any(command.stopped for command in commands)
    wrong = any(command.code and not command.stopped for command in commands)
    wrong = wrong or any("fault" in row for row in rows)
    if not part.commands:
        verdict = "skip"
    elif late:
        verdict = "cut" if part.may_be_cut and has_results and not wrong else "TIMEOUT"
    else:
        verdict = "FAIL" if failed else "pass"
    findings = [row["ok"] for row in rows if "ok" in row]
    words = [f"{sum(findings)} of {len(findings)} findings ok"] if findings else []
    measured = [row for row in rows if "suite" in row]
    if measured:
        faults = [f"{row.get('contender', '')}: {row['fault']}" for row in measured if "fault" in row]
        words.append(f"{len(measured) - len(faults)} figures{''.join(f'; {fault[:90]}' for fault in faults)}")
    if len(part.commands) > 1:
        words.append(f"{len(commands) - len(failed)} of {len(part.commands)} commands passed")
    words += [command.last_line for command in (failed or commands[-1:])[:1] if failed or not words]
    line = "; ".join(words) or ("no time left" if part.commands else "nothing to run here")
    return {"part": part.name, "verdict": verdict, "seconds": round(seconds), "line": line}


def choose_parts(program: str, parts: Sequence[Part], names: Sequence[str] | None) -> list[Part]:
    """The parts of these names in this order, all without any; exits with 2 for an unknown one."""
    known = {part.name: part for part in parts}
    if set(names or ()) - set(known):
        print(f"{program}: --parts here: {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    return [known[name] for name in names or known]


def run_parts(parts: Sequence[Part], out: Path, seconds: float) -> int:
    """Run all within `seconds`; the exit code."""
    end = time.monotonic() + seconds - min(RESERVE, seconds / 10)
    out.mkdir(parents=True, exist_ok=True)
    for name in _WRITTEN:
        (out / name).unlink(missing_ok=True)
    verdicts, lines = set(), []
    for i, part in enumerate(parts):
        needed = sum(later.seconds for later in parts[i:] if later.commands)
        share = part.seconds / needed if part.commands else 0.0
        row = run_part(part, out, max(0.0, end - time.monotonic()) * share)
        append(out / "results.jsonl", [{**row, "gpu_after": gpu_state()}])
        lines.append(f"{row['part']:<12}{row['verdict']:<9}{row['seconds']:>5} s  {row['line']}")
        (out / "summary.txt").write_text("\n".join(lines) + "\n")
        print(f"{row['part']}: {row['verdict']}", flush=True)
        verdicts.add(row["verdict"])
    print("", *lines, sep="\n", flush=True)
    return 0 if verdicts <= {"pass", "skip", "cut"} else 1
