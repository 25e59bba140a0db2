"""Tokens a second of our sampling and of transformers' generate, on this machine: A B B A, greedy, batch 1.

    python benchmarks/sampling.py [PRESET ...]

The same weights in both; the tokens must be the same, or there is no figure.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from fusedgpt.model.config import PRESETS
from fusedgpt.model.folder import save_folder
from fusedgpt.model.generate import generate
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import gpt2_tokenizer

TOKENS = 200


def seconds(work: Callable[[], list[int]]) -> tuple[float, list[int]]:
    start = time.perf_counter()
    tokens = work()
    return time.perf_counter() - start, tokens


def compare(preset: str) -> str:
    tokenizer = gpt2_tokenizer()
    ours = GPT(PRESETS[preset], seed=1).eval()
    with tempfile.TemporaryDirectory() as root:
        folder = save_folder(ours, tokenizer, Path(root), "m")
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    prompt = torch.tensor([tokenizer.encode("The quick brown fox")])

    def a() -> list[int]:
        return [int(t) for t in generate(ours, prompt, max_new_tokens=TOKENS, temperature=0.0)]

    def b() -> list[int]:
        options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        return [int(t) for t in theirs.generate(prompt, eos_token_id=None, **options)[0, prompt.shape[1] :]]

    assert a() == b(), "the two do not say the same"
    times = [seconds(work)[0] for work in (a, b, b, a)]
    first, second = min(times[0], times[3]), min(times[1], times[2])
    return (
        f"{preset}: fusedgpt {TOKENS / first:,.0f} tok/s, transformers {TOKENS / second:,.0f} tok/s, "
        f"ratio {second / first:.2f}"
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or ["12M", "117M"]:
        print(compare(name), flush=True)
