"""Memory and time of a training step, by formula: what `fusedgpt train --estimate` prints.

Shape letters: B windows of a forward pass, T tokens a window, M = B T, C channels, H heads, L blocks,
P padded vocabulary; e bytes of an activation, w bytes of a parameter.

Activations. What each op keeps for its backward pass, bytes per token and block, in the order of
Block.forward (what two ops keep counts once; each op's file has its save_for_backward):

    dropout_add_layer_norm    new residual, mean, rstd       C e + 8
    c_attn                    its input                      C e
    qkv_attention             q, k, v, output, log-sum-exp   4 C e + 4 H
    c_proj                    its input: attention's output
    dropout_add_layer_norm    new residual, mean, rstd       C e + 8
    c_fc                      its input                      C e
    bias_gelu                 its input                      4 C e
    c_proj                    its input                      4 C e
                                                             ------------------
    none                                                     16 C e + 4 H + 16
    selective: the inputs of attention and MLP, both norms    4 C e + 16
    full: the block's two inputs                              2 C e

The final norm adds C e + 8; the first block has one input only, the others on a GPU a bias (C,) too. Where
matrices are wider than activations (w = 4 on a CPU), "none" keeps each block's cast weights, 12 C^2 e, too.
The loss keeps the gradients it made in the forward pass and uses a buffer: linear_cross_entropy.extra_bytes.

A CPU runs plain PyTorch. There every dropout keeps a mask, C e, every norm of low-precision rows their fp32
copy, and attention, unless it is SDPA's, its fp32 weights, their mask and product, B H T^2 (8 + e), but no
log-sum-exp.

The peak is at one of two moments; between them activations give way to gradients. The backward pass enters
the last block (all activations, the embedding's gradient, what is recomputed of a block, and six tensors of
M C e on the way: the gradients of a residual, a norm and the MLP's wide part), or it leaves the first (all
gradients, one block's activations). Gradients summed over several forward passes are there at both, and on a
GPU cuBLAS's workspaces, one for the thread of the forward pass, one for the backward's. CUDA's context and
the allocator's rounding (up to 1 MiB per tensor) come on top; so does a validation, where a CUDA graph keeps
its step's memory.

Time. A parameter of a matrix product costs 6 FLOPs a token (2 forward, 4 backward), attention, as if it were
not causal, 12 C T a block: 6 N + 12 L C T, as in nanoGPT (PaLM, appendix B). N is every parameter but the
position embedding; the token embedding counts for the tied head. The predicted step takes those FLOPs, and
those of what is recomputed, at REACHED of the datasheet's rate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

import torch

from fusedgpt.kernels.cpu import linear_cross_entropy as plain
from fusedgpt.kernels.linear_cross_entropy import extra_bytes
from fusedgpt.model.config import GPTConfig
from fusedgpt.train.config import TrainConfig, windows_per_step
from fusedgpt.train.loop.precision import resolve_precision

CHECKPOINTING: tuple[str, ...] = get_args(TrainConfig.model_fields["checkpointing"].annotation)
REACHED = 0.4  # share of the datasheet's rate that a whole step gets to

# Datasheet rates of dense matrix products in FLOP/s: bf16 accumulating in fp32, and fp32 without TF32, which
# has half the rate of bf16. The first name that fits.
_PEAK_FLOPS = {
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "B200": (2250e12, 75e12),
    "A100": (312e12, 19.5e12),
    "L4": (121e12, 30e12),
    "RTX 4090": (165e12, 83e12),
    "RTX 3090": (71e12, 36e12),
}

_WORKSPACES = (
    2 * (32 << 20),
    2 * 8_519_680,
)  # of cuBLAS as torch sets it, on compute capability 9 and 10; else


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of checkpointing; memory in bytes. seconds_per_step is None where no rate is known."""

    checkpointing: str
    parameters: int
    gradients: int
    optimizer: int
    activations: int  # kept from the forward pass to the backward pass
    loss: int  # its buffers and gradients
    total: int  # the peak, less than the sum: not everything is there at once
    flops_per_token: float  # forward and backward
    recomputed_flops_per_token: float
    seconds_per_step: float | None
    tokens_per_step: int

    @property
    def relative_time(self) -> float:
        """Predicted, of a step without recomputation."""
        return 1.0 + self.recomputed_flops_per_token / self.flops_per_token


def peak_flops(device_name: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """The datasheet's rate in FLOP/s for a name such as torch.cuda.get_device_name gives; else 0.0.

    dtype: of the matrices, fp32 at the precision that torch now multiplies it in.
    """
    for name, (bf16, fp32) in _PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b(?! (Ti|D|Laptop)\b)", device_name, re.IGNORECASE):
            tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
            return bf16 if dtype.itemsize == 2 else bf16 / 2 if tf32 else fp32
    return 0.0


def workspace_bytes(device_name: str) -> int:
    """What cuBLAS keeps for itself during training."""
    if device_name == "cpu":
        return 0
    return _WORKSPACES[0 if re.search(r"\b(GH|GB|H|B)\d00\b", device_name) else 1]


def flops_per_token(gpt_config: GPTConfig, max_length: int) -> float:
    """Forward and backward of one token in a window of max_length: 6 N + 12 L C T, nothing recomputed."""
    N = gpt_config.parameter_counts()[0] - gpt_config.block_size * gpt_config.n_embd
    return 6.0 * N + 12.0 * gpt_config.n_layer * gpt_config.n_embd * max_length


def recomputed_flops_per_token(gpt_config: GPTConfig, max_length: int, checkpointing: str) -> float:
    """What the backward pass computes a second time, counted as in flops_per_token."""
    C = gpt_config.n_embd
    # c_attn and c_fc; full: attention's c_proj too. No op's backward pass needs the MLP's output.
    weights = {"none": 0, "selective": 7 * C * C, "full": 8 * C * C}[checkpointing]
    attention = 4.0 * C * max_length if weights else 0.0
    return gpt_config.n_layer * (2.0 * weights + attention)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What the bytes of activations depend on."""

    config: GPTConfig
    B: int
    T: int
    dtype: torch.dtype  # of activations
    weight_dtype: torch.dtype
    on_gpu: bool

    @property
    def _row(self) -> int:
        """Bytes of M rows of C activations."""
        return self.B * self.T * self.config.n_embd * self.dtype.itemsize

    def kept(self, checkpointing: str) -> int:
        """Activations kept from the forward to the backward pass, the loss's not counted."""
        L = self.config.n_layer
        if checkpointing == "full":
            biases = 4 * self.config.n_embd * (L - 1) if self.on_gpu else 0
            return (2 * L - 1) * self._row + biases + self._norm()
        inner = self._attention() + self._mlp() if checkpointing == "none" else 0
        return L * (2 * self._row + 2 * self._norm() + inner) + self._norm()

    def recomputed(self, checkpointing: str) -> int:
        """What the backward pass holds of the block it is in, besides what was kept."""
        if checkpointing == "selective":
            return max(self._attention(), self._mlp())
        return self.block() if checkpointing == "full" else 0

    def block(self) -> int:
        """What one block keeps without checkpointing."""
        return 2 * self._row + 2 * self._norm() + self._attention() + self._mlp()

    def _norm(self) -> int:
        """What dropout + add + norm keeps."""
        mask = 0 if self.on_gpu or self.config.dropout == 0.0 else self._row
        return self._row + self.B * self.T * 8 + mask + self._copies_on_cpu()

    def _attention(self) -> int:
        """What attention keeps besides its input."""
        weights = 4 * self._row + self._cast(4 * self.config.n_embd**2)
        if self.on_gpu:
            return weights + self.B * self.T * self.config.n_head * 4
        return weights + self._weights_on_cpu()

    def _weights_on_cpu(self) -> int:
        """Of plain PyTorch's attention (kernels/cpu/attention.py)."""
        low_precision = self.dtype.itemsize < 4
        if self.config.dropout == 0.0 and not (low_precision and self.T < 256):  # SDPA
            return self.B * self.T * self.config.n_head * 4
        each = self.dtype.itemsize + (8 if self.config.dropout else 4 if low_precision else 0)
        return self.B * self.config.n_head * self.T**2 * each

    def _mlp(self) -> int:
        """What the MLP keeps besides its input."""
        return 8 * self._row + self._cast(8 * self.config.n_embd**2)

    def _copies_on_cpu(self) -> int:
        """How much larger rows in fp32 are, where they are needed in fp32."""
        return 0 if self.on_gpu else self.B * self.T * self.config.n_embd * (4 - self.dtype.itemsize)

    def passing(self) -> int:
        """Gradients on their way through a block."""
        return 6 * self._row

    def loss(self) -> int:
        """The loss's buffers and gradients."""
        N, C, P = self.B * self.T, self.config.n_embd, self.config.padded_vocab_size
        if self.on_gpu:
            return extra_bytes(N, C, P, self.dtype, self.weight_dtype)
        logits = min(N, plain.ROWS) * P * self.dtype.itemsize
        return logits + 2 * N * C * self.dtype.itemsize + P * C * 4 + self._cast(P * C)  # hidden is kept

    def _cast(self, numel: int) -> int:
        return numel * self.dtype.itemsize if self.weight_dtype != self.dtype else 0


def estimate(
    gpt_config: GPTConfig,
    train: TrainConfig,
    max_length: int,
    device_name: str,
    *,
    fp32_weights: bool = False,
) -> list[Row]:
    """A row for each way of checkpointing. device_name: "cpu", or what torch.cuda.get_device_name says.

    fp32_weights: on a GPU too, as FSDP keeps them.
    """
    on_gpu = device_name != "cpu"
    if on_gpu and train.precision == "auto":
        dtype = torch.bfloat16  # every GPU our kernels run on has it
    else:
        dtype = resolve_precision(train.precision, torch.device("cpu"))
    windows = windows_per_step(train, max_length)
    shapes = Shapes(
        config=gpt_config,
        B=min(train.batch_size, windows),
        T=max_length,
        dtype=dtype,
        # as precision.cast_parameters leaves them
        weight_dtype=dtype if on_gpu and not fp32_weights else torch.float32,
        on_gpu=on_gpu,
    )
    peak = peak_flops(device_name) if dtype.itemsize == 2 else 0.0
    accumulates = windows > train.batch_size
    extra = workspace_bytes(device_name)
    muon = _muon_bytes(shapes) if train.optimizer == "muon" else (0, 0)
    tokens = windows * max_length
    return [_row(mode, shapes, tokens, accumulates, peak, extra, *muon) for mode in CHECKPOINTING]


def _muon_bytes(shapes: Shapes) -> tuple[int, int]:
    """(what Muon's one moment saves, what the largest batch of its matrices takes in a step)."""
    block = shapes.config.n_layer * shapes.config.n_embd**2  # elements of an output projection in every block
    batch = 16 * block * 2 if shapes.on_gpu else 35 * block * 4  # X, P X, A, P; seen of PyTorch
    return 4 * 12 * block, batch


def _row(
    checkpointing: str,
    shapes: Shapes,
    tokens: int,
    accumulates: bool,
    peak: float,
    workspaces: int,
    muon_saves: int,
    muon_step: int,
) -> Row:
    config, w = shapes.config, shapes.weight_dtype.itemsize
    embedding = config.padded_vocab_size * config.n_embd
    vectors = (13 * config.n_layer + 2) * config.n_embd  # biases and norms, always fp32
    matrices = config.parameter_counts()[0] + embedding - config.vocab_size * config.n_embd - vectors
    gradients = matrices * (4 if accumulates else w) + vectors * 4  # sums over micro-batches are fp32
    optimizer = matrices * (8 if w == 4 else 12) + vectors * 8  # two moments, low precision's fp32 masters
    optimizer -= muon_saves
    kept, recomputed = shapes.kept(checkpointing), shapes.recomputed(checkpointing)
    entering = kept + max(shapes.loss(), recomputed + shapes.passing() + embedding * w)
    entering += gradients if accumulates else 0
    leaving = gradients + max(recomputed, shapes.block()) + shapes.passing()
    flops = flops_per_token(config, shapes.T)
    again = recomputed_flops_per_token(config, shapes.T, checkpointing)
    return Row(
        checkpointing=checkpointing,
        parameters=matrices * w + vectors * 4,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        loss=shapes.loss(),
        total=matrices * w
        + vectors * 4
        + optimizer
        + max(entering, leaving, gradients + muon_step)
        + workspaces,
        flops_per_token=flops,
        recomputed_flops_per_token=again,
        seconds_per_step=tokens * (flops + again) / (REACHED * peak) if peak else None,
        tokens_per_step=tokens,
    )


def table(rows: list[Row]) -> list[dict[str, str]]:
    """Printable cells, a dict of column -> text a row; those of a prediction are empty without one."""
    return [
        {
            "checkpointing": row.checkpointing,
            "parameters": _size(row.parameters),
            "gradients": _size(row.gradients),
            "optimizer": _size(row.optimizer),
            "activations": _size(row.activations),
            "loss": _size(row.loss),
            "peak memory": _size(row.total),
            "FLOP/token": f"{row.flops_per_token:.3g}",
            "recomputed": f"{row.recomputed_flops_per_token:.3g}",
            "time (prediction)": f"{row.relative_time:.2f}x",
            "ms/step (prediction)": f"{1e3 * row.seconds_per_step:.1f}" if row.seconds_per_step else "",
            "tokens/s (prediction)": (
                f"{row.tokens_per_step / row.seconds_per_step:,.0f}" if row.seconds_per_step else ""
            ),
        }
        for row in rows
    ]


def _size(n_bytes: int) -> str:
    """In MB or GB, powers of ten: 1,234,567,890 bytes are "1.23 GB"."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
