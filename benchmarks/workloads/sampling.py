"""Tokens per second of our sampling, transformers' generate and nanoGPT's: greedy, in the order A B C C B A.

    python -m benchmarks.workloads.sampling [PRESET ...] [--batch-sizes 1 32] [--tokens 200] [--peer NANOGPT]

All have the same fp32 weights, in the layout that each wants, before the clock starts. A rival whose tokens
differ from ours gets no speed; one that is not installed is left out. nanoGPT has no greedy mode: it samples
with top_k 1.
"""

from __future__ import annotations

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

from benchmarks.arguments import make_parser
from benchmarks.clock import DEVICE
from benchmarks.report import record
from benchmarks.workloads.contenders import peer_model
from benchmarks.workloads.entrant import SHAPES
from fusedgpt.model.decode import store_for_decoding
from fusedgpt.model.folder import save_folder
from fusedgpt.model.generate import generate
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import gpt2_tokenizer

PROMPT = 4  # tokens
Sampler = Callable[[Tensor, int], Tensor]  # (prompt (B, T), new tokens) -> (B, new tokens)


def ours(gpt: GPT) -> Sampler:
    gpt = store_for_decoding(copy.deepcopy(gpt))
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


def compare(preset: str, samplers: dict[str, Sampler], prompt: Tensor, n: int) -> list[record.Row]:
    """Every sampler twice, after a short run that is not counted."""
    for sampler in samplers.values():
        sampler(prompt, 2)
    outputs: list[Tensor] = []  # ours comes first

    def run(name: str) -> record.Row:
        start = time.perf_counter()
        outputs.append(samplers[name](prompt, n).cpu())  # waits for a GPU
        milliseconds = 1e3 * (time.perf_counter() - start)
        same = torch.equal(outputs[-1], outputs[0])
        return {"times": [milliseconds]} if same else {"fault": "no speed: its tokens are not ours"}

    shape = f"{preset}, batch {len(prompt)}, {n} tokens"
    base = {"suite": "everyday", "name": "sampling", "shape": shape, "dtype": "fp32", "unit": "tok/s"}
    return record.contest(base, samplers, run, lambda row, _: {"rate": 1e3 * len(prompt) * n / row["ms"]})


def main() -> int:
    parser = make_parser(__doc__, "--peer")
    parser.add_argument("presets", nargs="*", default=["12M", "117M"], help="of " + ", ".join(SHAPES))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=200)
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
