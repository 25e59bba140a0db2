"""The shell scripts: from any directory, with a Python that is too old, with wrong usage."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").iterdir())


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_an_old_python_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    """A copy without .venv, and a Python that says it is 3.9."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2"\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        [tmp_path / "scripts" / name],
        env={**os.environ, "PYTHON": str(old)},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "needs Python 3.11 or newer; found Python 3.9.2" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    "name", ["quickstart", "test", "setup", "test_versions", "train_shakespeare_char_cpu"]
)
def test_help_is_all_that_a_script_does_when_asked_for_it(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    done = subprocess.run([tmp_path / "scripts" / name, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"scripts/{name}" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"scripts"}


@pytest.mark.parametrize("name", ["train_shakespeare_char", "train_shakespeare_char_cpu"])
def test_shakespeare_scripts_ask_for_their_file(name: str) -> None:
    done = subprocess.run([ROOT / "scripts" / name], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_the_workflow_runs_the_oldest_and_the_newest_that_the_package_allows() -> None:
    allowed = " ".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]["test"]
    oldest, newest = (row["packages"] for row in job["strategy"]["matrix"]["include"])
    for package in ("torch", "triton"):
        found = re.search(rf"{package}>=(\d+\.\d+),<(\d+)\.(\d+)", allowed)
        assert found
        first, major, beyond = found.groups()
        assert f"{package}=={first}.0" in oldest
        assert f"{package}=={major}.{int(beyond) - 1}." in newest
    tested = (ROOT / "scripts" / "test_versions").read_text()
    assert oldest in tested
    assert newest in tested
    for step in job["steps"]:
        subprocess.run(["bash", "-n", "-c", step.get("run", "")], check=True)
    assert job["steps"][-1]["run"] == "scripts/test"
