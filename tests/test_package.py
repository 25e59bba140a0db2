"""`import fusedgpt`: train, load and sample in a few lines, and quick to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fusedgpt
from fusedgpt.train.config import ConfigError

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "max_length": 32, "steps": 2}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_fit_load_and_sample(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("The cat sat on the mat. " * 60)
    made = fusedgpt.fit("book.txt", output_dir="out", tokenizer="char", **TINY)
    assert made.model_path.parent == Path("out")
    model = fusedgpt.load(made.model_path, device="cpu")
    first, again, other = (model.sample("The cat", max_new_tokens=9, seed=seed) for seed in (7, 7, 8))
    assert first == again != other
    assert first.startswith("The cat")
    with pytest.raises(ValueError, match="--temperature: expected 0 or more"):
        model.sample("The", temperature=-1.0)


def test_create_takes_the_options_of_the_command() -> None:
    made = fusedgpt.create("poems", tokenizer="byte", raw_tokens=3000, refined_tokens=1500, **TINY)
    assert made.summary.steps == 2
    with pytest.raises(ConfigError, match="n_head"):
        fusedgpt.create("poems", n_head=7)
    with pytest.raises(ConfigError, match="nonsense"):
        fusedgpt.fit("book.txt", nonsense=1)


def test_python_m_fusedgpt_is_the_command_and_the_import_is_quick() -> None:
    done = subprocess.run([sys.executable, "-m", "fusedgpt", "--version"], capture_output=True, text=True)
    assert done.stdout == f"fusedgpt {fusedgpt.__version__}\n"
    loaded = "import fusedgpt, sys; print(sorted({'torch', 'typer', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "[]\n"
    assert not hasattr(fusedgpt, "nonsense")
