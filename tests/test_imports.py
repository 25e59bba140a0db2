"""What importing costs, and which way imports point."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fusedgpt.train.cli.main", {"torch", "transformers", "tiktoken", "numpy", "pydantic"}),
        ("fusedgpt.model.tokenizer", {"torch", "transformers"}),
        ("fusedgpt.model.hf_config", {"torch", "transformers"}),
        ("fusedgpt.train.data.synthetic.grammar", {"torch", "transformers"}),
        ("fusedgpt.kernels.ops", {"transformers", "fusedgpt.model", "fusedgpt.train"}),
        ("fusedgpt.model.gpt", {"transformers", "fusedgpt.train"}),
    ],
)
def test_importing_one_does_not_import_the_other(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not absent & set(done.stdout.split())


@pytest.mark.parametrize(
    "command",
    [
        "list",
        "--help",
        "train --help",
        "train --print-config",
        "create --print-config",
        "train",
        "train --n-embd 7",
        "sample nowhere",
        "eval --help",
    ],
)
def test_a_command_that_needs_no_model_does_not_wait_for_torch(command: str, tmp_path: Path) -> None:
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules))"
    code += "; from fusedgpt.train.cli.main import main; main()"
    command_line = [sys.executable, "-c", code, *command.split()]
    done = subprocess.run(command_line, capture_output=True, text=True, cwd=tmp_path)
    assert "internal error" not in done.stderr
    modules = done.stdout.splitlines()[-1].split()
    assert "fusedgpt.train.cli.main" in modules
    assert "torch" not in modules


def test_a_model_without_memory_does_not_wait_for_the_compiler() -> None:
    """Loading a folder makes one, into which the weights are put; drawing there imports torch._dynamo."""
    code = (
        "import sys, torch; from fusedgpt.model.gpt import GPT, GPTConfig; torch.set_default_device('meta'); "
        "assert GPT(GPTConfig(n_layer=1)).wpe.weight.is_meta; assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("folder", "allowed"), [("kernels", {"kernels"}), ("model", {"kernels", "model"}), ("train", None)]
)
def test_imports_point_one_way(folder: str, allowed: set[str] | None) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        used = set(re.findall(r"^\s*(?:from|import) fusedgpt\.(\w+)", file.read_text(), re.MULTILINE))
        assert used <= (allowed or {"kernels", "model", "train"}), file


def test_ruff_enforces_it(tmp_path: Path) -> None:
    for folder, line in (
        ("kernels", "import fusedgpt.model.gpt"),
        ("model", "import fusedgpt.train.loop.step"),
    ):
        command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename"]
        done = subprocess.run(
            [*command, f"{folder}/probe.py", "-"], input=line, capture_output=True, text=True, cwd=ROOT
        )
        assert "TID251" in done.stdout, done.stderr


def test_transformers_imports_beside_our_kernels_folder() -> None:
    """A top-level package `kernels` in the working directory once broke this."""
    code = "import sys; sys.path.insert(0, '.'); from transformers import GPT2LMHeadModel"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_a_wheel_has_every_folder() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent for room in ("kernels", "model", "train") for file in (ROOT / room).rglob("*.py")}
    names = {"fusedgpt." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names | {"fusedgpt"} == set(settings["packages"])
