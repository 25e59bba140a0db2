"""What macOS lacks is hidden from a process on Linux: triton, forking workers, and what only Linux has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

AS_ON_MACOS = """
import ctypes, errno, glob, importlib.machinery, json, multiprocessing, os, sys, sysconfig
import tokenizers, torch
sysconfig.get_config_vars()  # read by platform name, once

def hide(owner, name, hidden):
    # owner.name, but FileNotFoundError where hidden(first argument)
    found = getattr(owner, name)
    def visible(first, *rest, **named):
        if hidden(first):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), first)
        return found(first, *rest, **named)
    setattr(owner, name, visible)

def opened(event, arguments):
    if event == "open" and str(arguments[0]).startswith("/proc/"):
        raise FileNotFoundError(arguments[0])

class Libc:  # macOS has one, without glibc's functions
    def __init__(self, name):
        if name is not None:
            raise OSError(f"no library {name}")

find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *where: (
    None if name.partition(".")[0] == "triton" else find(name, *where)
)
for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
    del sys.modules[name]
for name in dir(os):
    if name.startswith(("sched_", "posix_f", "memfd", "eventfd", "pidfd")) or name in {
        "O_DIRECT", "O_PATH", "O_TMPFILE", "copy_file_range", "fdatasync", "getrandom", "splice"
    }:
        delattr(os, name)
hide(os, "stat", lambda path: str(path).startswith("/proc/"))
hide(multiprocessing, "get_context", lambda method: method == "fork")  # Apple's libraries crash in a fork
sys.addaudithook(opened)
ctypes.CDLL = Libc
sys.platform = "darwin"

from fusedgpt.train.cli.main import main
for expected, *arguments in json.loads(sys.argv[1]):
    try:
        main([path for a in arguments for path in (glob.glob(a) if "*" in a else [a])])
    except SystemExit as end:
        assert (end.code or 0) == expected, (arguments, end.code)
"""


def test_what_runs_without_linux(tmp_path: Path) -> None:
    """Each hidden thing is reached: without the code that does without it, a command fails."""
    (tmp_path / "text.txt").write_text("It is raining.\n" * 80_000)  # enough for two workers
    tiny = ["--n-layer", "1", "--n-embd", "32", "--n-head", "2", "--steps", "2"]
    models, tokens = str(tmp_path / "models"), str(tmp_path / "tokens")
    commands: list[list[str | int]] = [
        [0, "create", "haiku about rain", *tiny, "--refined-tokens", "2000", "--output-dir", models],
        [0, "sample", f"{models}/*", "--max-new-tokens", "5"],
        [0, "prepare", str(tmp_path / "text.txt"), "--tokenizer", "byte", "--out", tokens],
        [0, "train", "--data", tokens, *tiny, "--output-dir", models],
        [0, "doctor"],
        [1, "kernels", "check"],
        [1, "kernels", "report"],
    ]
    command = [sys.executable, "-c", AS_ON_MACOS, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fusedgpt: the kernels need the package triton") == 2
    assert "internal error" not in done.stderr
