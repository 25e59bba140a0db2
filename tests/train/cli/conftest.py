from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from command import Run

from fusedgpt.train.cli.main import main


@pytest.fixture
def fusedgpt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`process` without the process, whose start takes two seconds."""

    def run(*arguments: str | Path, input: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["fusedgpt", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return subprocess.CompletedProcess(arguments, int(end.value.code or 0), *capsys.readouterr())

    return run
