"""The learning rate of a step."""

from __future__ import annotations

import math

from fusedgpt.train.config import TrainConfig


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The rate of step 0 .. total_steps - 1, between the peak and the minimum of `config`.

    First linear warm-up (Goyal et al. 2017, arXiv:1706.02677, section 2.2), whose step after the last has the
    peak; then, with t from 0 there to 1 at the run's last step,

    constant      the peak
    linear        peak - (peak - min) * t
                  (Defazio et al. 2023, arXiv:2310.07831)
    cosine        min + (peak - min) * (1 + cos(pi * t)) / 2
                  (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5)
    wsd           the peak, but over the last decay_steps a linear fall to the minimum
                  (warmup-stable-decay: Hu et al. 2024, arXiv:2404.06395, section 4; the linear fall:
                  Haegele et al. 2024, arXiv:2405.18392)
    inverse_sqrt  peak * sqrt((warmup + 1) / (step + 1)), not below the minimum, whatever the run's length
                  (Vaswani et al. 2017, arXiv:1706.03762, eq. 3, scaled to the peak)
    """
    peak = config.learning_rate
    floor = peak / 10 if config.min_learning_rate is None else config.min_learning_rate
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == "inverse_sqrt":
        return max(floor, peak * math.sqrt((warmup + 1) / (step + 1)))
    return floor + (peak - floor) * _share_of_peak(step, warmup, total_steps, config)


def _share_of_peak(step: int, warmup: int, total_steps: int, config: TrainConfig) -> float:
    """1 at the peak, 0 at the minimum, for a step after the warm-up."""
    last = total_steps - 1
    progress = min(1.0, (step - warmup) / max(1, last - warmup))
    if config.schedule == "linear":
        return 1 - progress
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if config.schedule == "wsd":
        decay = decay_steps(total_steps, config)
        return min(1.0, max(0, last - step) / decay) if decay else 1.0
    return 1.0


def warmup_steps(total_steps: int, config: TrainConfig) -> int:
    """config.warmup in steps: a fraction of the run below 1, a count from 1 on."""
    return _in_steps(config.warmup, total_steps)


def decay_steps(total_steps: int, config: TrainConfig) -> int:
    """Steps below the peak at wsd's end: config.decay, a fraction or a count, where warm-up leaves room."""
    return min(_in_steps(config.decay, total_steps), max(0, total_steps - warmup_steps(total_steps, config)))


def _in_steps(length: float, total_steps: int) -> int:
    return round(length * total_steps) if length < 1 else int(length)
