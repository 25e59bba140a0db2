"""What `pip install` gives: a wheel, built from the sdist, that works in another directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 32 --max-length 32 --steps 2 --tokenizer gpt2"


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_a_wheel_of_the_sdist_creates_a_model(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # building leaves files
    tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", tree)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = run(
        sys.executable, "-c", "import fusedgpt.train; print(fusedgpt.train.__path__[0])", env=environment
    )
    assert where.startswith(str(site))
    create = [sys.executable, "-m", "fusedgpt", "create", "poems", *TINY.split(), "--raw-tokens", "3000"]
    made = run(*create, "--refined-tokens", "1500", "--json", cwd=tmp_path, env=environment)
    assert json.loads(made)["steps"] == 2
