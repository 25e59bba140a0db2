"""The learning rate of a step."""

from __future__ import annotations

import math

from fusedgpt.train.config import TrainConfig


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The rate of step 0 .. total_steps - 1: linear warm-up, then cosine to the minimum, or constant."""
    peak = config.learning_rate
    floor = peak / 10 if config.min_learning_rate is None else config.min_learning_rate
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_steps(total_steps: int, config: TrainConfig) -> int:
    """config.warmup in steps: a fraction of the run below 1, a count from 1 on."""
    return round(config.warmup * total_steps) if config.warmup < 1 else int(config.warmup)
