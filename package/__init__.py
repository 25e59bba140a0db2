"""Small GPTs, trained fast, from Python. docs/python.md has the ops and the long way.

    import fusedgpt

    made = fusedgpt.fit("book.txt", tokenizer="char", steps=200)
    model = fusedgpt.load(made.model_path)
    print(model.sample("The"))

A setting has the name of its command-line option: --max-length is max_length. Importing this loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

if TYPE_CHECKING:
    from fusedgpt.model.generate import Sampling
    from fusedgpt.model.gpt import GPT
    from fusedgpt.model.tokenizer import Tokenizer
    from fusedgpt.train.pipeline import TrainingResult

if not Path(__file__).with_name("kernels").is_dir():  # a checkout, in which the folders lie beside this one
    __path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("fusedgpt")
    raise AttributeError(f"module 'fusedgpt' has no attribute {name!r}")


@dataclass(frozen=True)
class Model:
    """A GPT and its tokenizer."""

    gpt: GPT
    tokenizer: Tokenizer

    def sample(self, prompt: str = "", **settings: Unpack[Sampling]) -> str:
        """The prompt and its continuation; settings: those of model.generate.Sampling.

        Raises ValueError for a setting out of range or a prompt that the tokenizer cannot encode.
        """
        from fusedgpt.model.generate import sample_texts

        return sample_texts(self.gpt, self.tokenizer, prompt, **settings)[0]


def load(folder: str | Path, device: str = "auto") -> Model:
    """The model in a folder, ours or of a GPT-2 that transformers saved.

    device: auto, cpu, cuda or cuda:N. Raises ModelFolderError for a folder, ConfigError for a device.
    """
    from fusedgpt.model.decode import store_for_decoding
    from fusedgpt.model.folder import load_folder
    from fusedgpt.train.loop.precision import resolve_device

    gpt, tokenizer = load_folder(Path(folder))
    return Model(store_for_decoding(gpt.to(resolve_device(device))), tokenizer)


def create(prompt: str, *, output_dir: str | Path = "models", **settings: Any) -> TrainingResult:
    """What `fusedgpt create` does; raises ConfigError for a setting, and what run_full_pipeline raises."""
    from fusedgpt.train.defaults import create_config
    from fusedgpt.train.pipeline import run_full_pipeline

    return run_full_pipeline(prompt, create_config(settings), Path(output_dir))


def fit(*paths: str | Path, output_dir: str | Path = "models", **settings: Any) -> TrainingResult:
    """What `fusedgpt train` does; raises ConfigError for a setting, and what train_on_files raises."""
    from fusedgpt.train.defaults import train_config
    from fusedgpt.train.pipeline import train_on_files

    return train_on_files([Path(path) for path in paths], train_config(settings), Path(output_dir))
