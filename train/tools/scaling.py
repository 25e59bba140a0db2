"""What several GPUs make of a step, by formula: what `fusedgpt train --estimate` prints of them.

P parameters, N cards, all at the same time. Bytes that each card sends in a step:

    DDP     all-reduce of fp32 gradients, once a step       2 (N - 1) / N * 4 P
    FSDP    two gathers and a reduction of fp32, each       3 (N - 1) / N * 4 P
            micro-batch

They travel while the card computes: DDP's during the last micro-batch's backward pass, two thirds of its
time, FSDP's during all of each micro-batch. What takes longer than that is waited for. Several machines of 8
cards send what 8 cards send over NVLink, and 2 (M - 1) / M, or 3 (M - 1) / M, times 4 P from each of the M
machines over its network.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedgpt.model.config import GPTConfig
from fusedgpt.train.config import TrainConfig, windows_per_step
from fusedgpt.train.tools.estimate import CHECKPOINTING, Row, estimate

USABLE_MEMORY = 0.9  # of a GPU: CUDA's context and fragments take the rest
ASSUMED = "NVIDIA H100 80GB HBM3"  # where a run is planned on a machine without a GPU
PER_MACHINE = 8  # cards
CARDS = (2, 4, 8, 16, 32, 64)
# Bytes/s that a ring of NCCL gets out of a card's NVLink 4 or PCIe 4.0 x16, and of a machine's 400 Gb/s.
LINKS = {"NVLink": 360e9, "PCIe": 20e9, "network": 40e9}


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A step on several cards; times in seconds, None where the card's rate is not known."""

    cards: int
    link: str  # of LINKS; "network": NVLink within a machine
    parallel: str  # "ddp" or "fsdp"
    memory: int  # bytes a card, at the peak
    sent: float  # bytes a card and step
    sending: float
    hidden: float | None  # how much of it the computing hides
    seconds: float | None  # of the step
    alone: float | None  # of the step on one card
    tokens: int

    @property
    def speedup(self) -> float | None:
        """Over one card."""
        return self.alone / self.seconds if self.alone and self.seconds else None


def ddp_memory(row: Row, dtype_bytes: int) -> int:
    """A card's peak under DDP, whose 16-bit gradients are added up in fp32 copies."""
    return row.total + (2 * row.parameters if dtype_bytes == 2 else 0)


def _fsdp_memory(row: Row, config: GPTConfig, cards: int) -> int:
    """A card's peak under FSDP: row is of fp32 weights; the embedding and two blocks are gathered."""
    states = row.parameters + row.gradients + row.optimizer
    blocks = min(2, config.n_layer) * 12 * config.n_embd**2
    gathered = 4 * (config.padded_vocab_size * config.n_embd + blocks)
    return row.total - states + states // cards + gathered


def scale(
    config: GPTConfig,
    train: TrainConfig,
    max_length: int,
    device_name: str,
    *,
    card_bytes: float = float("inf"),  # memory of a card; where DDP does not fit, FSDP it is
) -> list[Scaled]:
    """The step on each number of CARDS that divides it, over each link."""
    windows = windows_per_step(train, max_length)
    mode = CHECKPOINTING.index(train.checkpointing)
    one = estimate(config, train, max_length, device_name)[mode]
    sharded = estimate(config, train, max_length, device_name, fp32_weights=True)[mode]
    dtype_bytes = 4 if train.precision == "fp32" or device_name == "cpu" else 2
    found = []
    for cards in CARDS:
        if windows % cards:
            continue
        memory, parallel = ddp_memory(one, dtype_bytes), "ddp"
        if train.parallel == "fsdp" or (train.parallel == "auto" and memory > card_bytes):
            memory, parallel = _fsdp_memory(sharded, config, cards), "fsdp"
        for link in ("NVLink", "PCIe") if cards <= PER_MACHINE else ("network",):
            found.append(_scaled(config, train, one, windows, cards, link, parallel, memory))
    return found


def _scaled(
    config: GPTConfig,
    train: TrainConfig,
    one: Row,
    windows: int,
    cards: int,
    link: str,
    parallel: str,
    memory: int,
) -> Scaled:
    mine = windows // cards
    micro_batches = -(-mine // train.batch_size)
    passes = 2 if parallel == "ddp" else 3 * micro_batches  # of all parameters over the wire
    n_bytes = 4 * config.parameter_counts()[0] * passes
    local = min(cards, PER_MACHINE)
    sent = n_bytes * (local - 1) / local
    sending = sent / LINKS["NVLink" if link == "network" else link]
    if link == "network":
        machines = cards // PER_MACHINE
        sending += n_bytes * (machines - 1) / machines / LINKS["network"]
    alone = one.seconds_per_step
    if alone is None:
        hidden = seconds = None
    else:
        computing = alone / cards
        last = computing * min(train.batch_size, mine) / mine
        hidden = min(sending, 2 / 3 * last if parallel == "ddp" else computing)
        seconds = computing + sending - hidden
    return Scaled(
        cards=cards,
        link=link,
        parallel=parallel,
        memory=memory,
        sent=sent,
        sending=sending,
        hidden=hidden,
        seconds=seconds,
        alone=alone,
        tokens=one.tokens_per_step,
    )


def table(rows: list[Scaled]) -> list[dict[str, str]]:
    """Printable cells, as estimate.table's; all of them are predictions."""
    return [
        {
            "cards": str(row.cards),
            "link": row.link,
            "parallel": row.parallel,
            "memory a card": f"{row.memory / 1e9:.2f} GB",
            "sent a step": f"{row.sent / 1e9:.2f} GB",
            "ms to send": f"{1e3 * row.sending:.1f}",
            "of them hidden": "" if row.hidden is None else f"{1e3 * row.hidden:.1f}",
            "ms/step (prediction)": "" if row.seconds is None else f"{1e3 * row.seconds:.1f}",
            "tokens/s (prediction)": "" if row.seconds is None else f"{row.tokens / row.seconds:,.0f}",
            "speed-up": "" if row.speedup is None else f"{row.speedup:.1f}x",
        }
        for row in rows
    ]
