"""Tokens a second of our sampling, transformers' generate and nanoGPT's: greedy, in the order A B C C B A.

    python benchmarks/sampling.py [PRESET ...] [--batch-sizes 1 32] [--tokens 200] [--peer NANOGPT]

The same weights in all, fp32, laid out as each wants them before the clock starts. A rival whose tokens are
not ours, or that is not installed, has no figure.
nanoGPT has no greedy mode: it takes the likeliest of 1 (top_k=1).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ceilings import DEVICE
from benchmarks.report import record
from benchmarks.workloads.contenders import peer_model
from benchmarks.workloads.training_step import SHAPES
from fusedgpt.model.folder import save_folder
from fusedgpt.model.generate import generate
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import gpt2_tokenizer

PROMPT = 4  # tokens
Sampler = Callable[[Tensor, int], Tensor]  # (prompt (B, T), new tokens) -> (B, new tokens)


def ours(gpt: GPT) -> Sampler:
    gpt = copy.deepcopy(gpt).for_sampling()
    return lambda prompt, n: torch.stack(
        list(generate(gpt, prompt, max_new_tokens=n, temperature=0.0)), dim=1
    )


def transformers(gpt: GPT) -> Sampler:
    """transformers' generate, on the folder that ours saves."""
    with tempfile.TemporaryDirectory() as root:
        folder = save_folder(gpt, gpt2_tokenizer(), Path(root), "m")
        theirs = importlib.import_module("transformers").GPT2LMHeadModel.from_pretrained(folder)
    theirs.eval().to(DEVICE)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def sample(prompt: Tensor, n: int) -> Tensor:
        out: Tensor = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n, **options
        )
        return out[:, prompt.shape[1] :]

    return sample


def peer(path: Path, gpt: GPT) -> Sampler:
    """nanoGPT's generate; its padded rows of the vocabulary never win: their logits are 0."""
    theirs = peer_model(path, gpt.config, gpt.state_dict()).eval().to(DEVICE)
    return lambda prompt, n: theirs.generate(prompt, n, top_k=1)[:, prompt.shape[1] :]


def seconds(sampler: Sampler, prompt: Tensor, n: int) -> tuple[float, Tensor]:
    start = time.perf_counter()
    out = sampler(prompt, n).cpu()  # waits for a GPU
    return time.perf_counter() - start, out


def compare(preset: str, samplers: dict[str, Sampler], prompt: Tensor, n: int) -> list[record.Row]:
    """Every sampler twice, after a short run that is not counted."""
    runs: dict[str, list[float]] = {name: [] for name in samplers}
    said: dict[str, Tensor] = {}
    for sampler in samplers.values():
        seconds(sampler, prompt, 2)
    for name in (*samplers, *reversed(samplers)):
        time_, said[name] = seconds(samplers[name], prompt, n)
        runs[name].append(time_)
    rows = []
    for name, times in runs.items():
        row = {"suite": "everyday", "name": "sampling", "shape": f"{preset}, batch {len(prompt)}, {n} tokens"}
        row |= {"dtype": "fp32", "contender": name}
        if torch.equal(said[name], said["ours"]):
            row |= record.summary([[1e3 * t] for t in times])
            row |= {"rate": prompt.shape[0] * n / (1e-3 * row["ms"]), "unit": "tok/s"}
        else:
            row["fault"] = "no speed: its tokens are not ours"
        record.emit(row)
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", default=["12M", "117M"], help="of " + ", ".join(SHAPES))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--peer", type=Path, help="a checkout of karpathy/nanoGPT")
    arguments = parser.parse_args()
    rows = []
    for preset in arguments.presets:
        gpt = GPT(SHAPES[preset], seed=1).eval().to(DEVICE)
        samplers = {"ours": ours(gpt)}
        if find_spec("transformers") and preset != "toy":  # which has no tokenizer
            samplers["transformers"] = transformers(gpt)
        if arguments.peer:
            samplers["peer"] = peer(arguments.peer, gpt)
        for batch_size in arguments.batch_sizes:
            generator = torch.Generator().manual_seed(0)
            prompt = torch.randint(SHAPES[preset].vocab_size, (batch_size, PROMPT), generator=generator)
            rows += compare(preset, samplers, prompt.to(DEVICE), arguments.tokens)
    return 1 if record.faults(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
