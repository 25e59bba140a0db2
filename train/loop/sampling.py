"""Samples from the model while it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from fusedgpt.kernels.errors import InputError
from fusedgpt.model.generate import Sampling, sample_batch
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.train.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Continues the same prompts every few steps, from the same seed, so that only the model differs."""

    tokenizer: Tokenizer
    prompts: list[str]
    every: int  # steps
    seed: int

    @classmethod
    def from_config(cls, config: RunConfig, tokenizer: Tokenizer) -> Self | None:
        """What --sample-every asks for. Raises InputError for a prompt that the tokenizer cannot encode."""
        if config.saving.sample_every is None:
            return None
        prompts = config.saving.sample_prompt or [""]
        for prompt in prompts:
            try:
                tokenizer.encode(prompt)
            except ValueError as error:
                raise InputError(f"--sample-prompt {prompt!r}: {error}") from None
        return cls(
            tokenizer=tokenizer,
            prompts=prompts,
            every=config.saving.sample_every,
            seed=config.train.seed,
        )

    def texts(self, model: GPT) -> dict[str, str]:
        """By prompt, the prompt and its continuation. Changes nothing that training depends on."""
        sampling = Sampling(max_new_tokens=60, temperature=0.8, top_k=40, seed=self.seed)
        try:
            samples = sample_batch(model, self.tokenizer, self.prompts, **sampling)
        finally:
            model.train()
        return dict(zip(self.prompts, (text for (text,) in samples), strict=True))
