"""GPTConfig and the presets."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

VOCAB_MULTIPLE = 128  # aligned rows let loads vectorise


class GPTConfig(BaseModel):
    """The shape of a GPT-2; validated on construction (pydantic.ValidationError, a ValueError)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    vocab_size: int = Field(default=50257, ge=1, le=1 << 20)
    block_size: int = Field(default=512, ge=1, le=1 << 20)  # the longest context, in tokens
    trained_length: int | None = Field(default=None, ge=1)  # tokens of a training window; None: block_size
    n_layer: int = Field(default=6, ge=1, le=1024)
    n_head: int = Field(default=6, ge=1, le=1024)
    n_embd: int = Field(default=384, ge=1, le=1 << 16)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    layer_norm_epsilon: float = Field(default=1e-5, gt=0.0)

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.window > self.block_size:
            raise ValueError(f"trained_length {self.window} is longer than block_size {self.block_size}")
        return self

    @property
    def window(self) -> int:
        """The longest context that training has seen, in tokens."""
        return self.trained_length or self.block_size

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.n_embd // self.n_head

    def parameter_counts(self) -> tuple[int, int]:
        """(all parameters, those outside the two embedding tables), the vocabulary's padding not counted."""
        C = self.n_embd
        blocks = self.n_layer * (12 * C * C + 13 * C)  # attention 4CC + 4C, MLP 8CC + 5C, two norms 4C
        embeddings = (self.vocab_size + self.block_size) * C
        return blocks + 2 * C + embeddings, blocks + 2 * C


def _preset(n_layer: int, n_head: int, n_embd: int, block_size: int) -> GPTConfig:
    return GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)


PRESETS: dict[str, GPTConfig] = {
    "1M": _preset(2, 3, 192, 512),
    "3M": _preset(4, 4, 256, 512),
    "12M": _preset(6, 6, 384, 512),
    "33M": _preset(8, 8, 512, 512),
    "117M": _preset(12, 12, 768, 512),
    "gpt2": _preset(12, 12, 768, 1024),
    "gpt2-medium": _preset(24, 16, 1024, 1024),
    "gpt2-large": _preset(36, 20, 1280, 1024),
    "gpt2-xl": _preset(48, 25, 1600, 1024),
}
