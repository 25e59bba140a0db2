"""Runs the parts of gpu_check.py and report.py: processes with time limits, their rows and verdicts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GRACE, RESERVE = 10.0, 3.0  # seconds from SIGINT to SIGKILL, and for the summary


@dataclass(frozen=True, kw_only=True)
class Part:
    """Commands that pass if all of them exit with 0; skipped if there are none."""

    name: str
    share: float  # of the time left, against the shares of the parts to come
    commands: list[list[str]]
    jobs: int = 1  # how many run at once
    needs_gpu: bool = True
    keeps_rows: bool = False  # its JSON lines in DIR/<name>.json as well
    may_be_cut: bool = False  # running out of time is no failure, if it has results by then
    environment: dict[str, str] = field(default_factory=dict)


class Command:
    """One running command of a part, in a process group of its own; its output in DIR until it ends."""

    def __init__(self, part: Part, index: int, out: Path, seconds: float) -> None:
        self.part, self.out, self.stopped, self.finished = part, out, False, False
        self.rows: list[dict[str, Any]] = []
        self.read = 0  # bytes of the output that were harvested
        self.arguments = [a.replace("{minutes}", f"{0.8 * seconds / 60:.2f}") for a in part.commands[index]]
        self.output = out / f"{part.name}-{index}.out"
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        extra = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "BENCHMARK_RESULTS": str(out / "results.jsonl")}
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                self.arguments,
                cwd=ROOT,
                env={**os.environ, **extra, **part.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Started in the background of a shell we ignore SIGINT, and children would inherit that.
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

    def harvest(self, *, ended: bool = False) -> None:
        """Keep what the command has printed since as rows: its whole lines of JSON."""
        with self.output.open("rb") as file:
            file.seek(self.read)
            new = file.read()
        new = new if ended else new[: new.rfind(b"\n") + 1]
        self.read += len(new)
        rows = [row for line in new.decode(errors="replace").splitlines() for row in json_rows(line)]
        append(self.out / "results.jsonl", ({"part": self.part.name, **row} for row in rows))
        self.rows += rows

    def finish(self) -> None:
        """End what the command has left running, log its output and keep its last rows."""
        self.signal_group(signal.SIGKILL)
        returned = self.process.poll()
        self.code = -signal.SIGKILL if returned is None else returned
        self.harvest(ended=True)
        text = self.output.read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        self.last_line = lines[-1].strip(" =")[:150] if lines else f"exit code {self.code}"
        with (self.out / "log.txt").open("a") as log:
            log.write(f"\n=== {self.part.name}, exit code {self.code}: {' '.join(self.arguments)}\n{text}")
        self.output.unlink()
        self.finished = True


def json_rows(line: str) -> list[dict[str, Any]]:
    """The objects on a line of JSON; [] for any other line."""
    with suppress(ValueError):
        found = json.loads(line) if line.startswith(("{", "[")) else []
        return [row for row in (found if isinstance(found, list) else [found]) if isinstance(row, dict)]
    return []


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add JSON lines to a file that other processes add to as well."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("a") as file:
        file.write(text)


def run_part(part: Part, out: Path, seconds: float) -> dict[str, Any]:
    """Run the part's commands, `jobs` at once, and stop all of them after `seconds`: a row of the summary."""
    start = now = time.monotonic()
    end, interrupt = start + seconds, start + seconds - min(GRACE, seconds / 4)
    waiting = list(range(len(part.commands)))
    begun: list[Command] = []
    running: list[Command] = []
    results = out / "results.jsonl"
    before = results.stat().st_size if results.exists() else 0
    try:
        while (running or (waiting and now < interrupt)) and now < end + 1.0:  # some hangs outlive SIGKILL
            while waiting and len(running) < part.jobs and now < interrupt:
                begun.append(Command(part, waiting.pop(0), out, seconds))
                running.append(begun[-1])
            time.sleep(0.05)
            now = time.monotonic()
            for command in running:
                command.harvest()
                command.enforce(now, interrupt, end)
            running = settle(part, out, begun)
    finally:
        settle(part, out, begun, abandon=True)
    grew = results.exists() and results.stat().st_size > before
    return judge(part, begun, now - start, may_be_cut=part.may_be_cut and grew)


def settle(part: Part, out: Path, begun: Sequence[Command], *, abandon: bool = False) -> list[Command]:
    """Finish what has ended, and with `abandon` all the rest; what is still running."""
    open_ = [command for command in begun if not command.finished]
    ended = [command for command in open_ if abandon or command.process.poll() is not None]
    for command in ended:
        command.finish()
    if ended and part.keeps_rows:
        rows = [row for command in begun if command.finished for row in command.rows]
        (out / f"{part.name}.json").write_text(json.dumps(rows, indent=1))
    return [command for command in open_ if not command.finished]


def judge(
    part: Part, commands: Sequence[Command], seconds: float, *, may_be_cut: bool = False
) -> dict[str, Any]:
    """The row of the summary: verdict, counts, and the last line of the first command that failed."""
    failed = [command for command in commands if command.code or command.stopped]
    late = len(commands) < len(part.commands) or any(command.stopped for command in commands)
    wrong = any(command.code and not command.stopped for command in commands)
    wrong = wrong or any("fault" in row for command in commands for row in command.rows)
    verdict = "cut" if may_be_cut and not wrong else "TIMEOUT"
    verdict = "skip" if not part.commands else verdict if late else "FAIL" if failed else "pass"
    findings = [row["ok"] for command in commands for row in command.rows if "ok" in row]
    words = [f"{sum(findings)} of {len(findings)} findings ok"] if findings else []
    measured = [row for command in commands for row in command.rows if "suite" in row]
    if measured:
        faults = [f"{row.get('contender', '')}: {row['fault']}" for row in measured if "fault" in row]
        words.append(f"{len(measured) - len(faults)} figures{''.join(f'; {fault[:90]}' for fault in faults)}")
    if len(part.commands) > 1:
        words.append(f"{len(commands) - len(failed)} of {len(part.commands)} commands passed")
    words += [command.last_line for command in (failed or commands[-1:])[:1] if failed or not words]
    line = "; ".join(words) or ("no time left" if part.commands else "nothing to run here")
    return {"part": part.name, "verdict": verdict, "seconds": round(seconds), "line": line}


def finding_lines(path: Path) -> Iterator[str]:
    """The table of the findings that check.json holds."""
    for row in json.loads(path.read_text()) if path.exists() else []:
        error, limit = (row[name] or float("nan") for name in ("error", "limit"))
        what = f"{row['op']:<23}{row['dtype']:<6}{row['shape']:<52}{row['direction']:<9}{row['output']:<8}"
        verdict = "ok" if row["ok"] else f"FAIL {row['exception'][:150]}"
        yield f"{what}{error:9.2e} of {limit:.2e}  {verdict}\n"


def run_parts(parts: Sequence[Part], out: Path, seconds: float) -> int:
    """Run all within `seconds`; the exit code."""
    end = time.monotonic() + seconds - min(RESERVE, seconds / 10)
    out.mkdir(parents=True, exist_ok=True)
    for name in (
        "results.jsonl",
        "log.txt",
        "check.json",
        "environment.json",
        "report.html",
        "report.md",
        "summary.txt",
    ):
        (out / name).unlink(missing_ok=True)
    verdicts, lines = set(), []
    for i, part in enumerate(parts):
        share = part.share / sum(later.share for later in parts[i:])
        row = run_part(part, out, max(0.0, end - time.monotonic()) * share)
        append(out / "results.jsonl", [{**row, "gpu_after": gpu_state()}])
        lines.append(f"{row['part']:<12}{row['verdict']:<9}{row['seconds']:>5} s  {row['line']}")
        (out / "summary.txt").write_text("\n".join(lines) + "\n")
        print(f"{row['part']}: {row['verdict']}", flush=True)
        verdicts.add(row["verdict"])
    with (out / "log.txt").open("a") as log:
        log.writelines(["\n=== findings\n", *finding_lines(out / "check.json")])
    print("", *lines, sep="\n", flush=True)
    return 0 if verdicts <= {"pass", "skip", "cut"} else 1


def gpu_state() -> dict[str, str]:
    """Clocks, temperature, power and so on, as nvidia-smi has them; {} without it."""
    names = "name,driver_version,pstate,clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used"
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        return dict(zip(names.split(","), text.splitlines()[0].split(", "), strict=False))
    return {}
