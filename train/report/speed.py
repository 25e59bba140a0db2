"""How fast a run trains."""

from __future__ import annotations

import math
from collections import deque

_WINDOW = 30.0  # seconds
_RESOLUTION = 0.3  # seconds


class Speed:
    """Steps and tokens per second over the last half minute of training, or the last reading if longer.

    The very first reading, which includes compilation, is dropped as soon as there is another. Steps that are
    read together share their time, so a time counts only once a later one has come: then all its tokens are
    known.
    """

    def __init__(self, step: int, tokens: int) -> None:
        self._points = deque([(0.0, step, tokens)])
        self._holds_first = True

    def add(self, seconds: float, step: int, tokens: int, *, last: bool = False) -> tuple[float, float]:
        """(steps, tokens) per second, NaN before they are known; `last`: no later step will come."""
        points = self._points
        ends_at = points[-1][0]
        close_by = len(points) > 1 and seconds - points[-2][0] < _RESOLUTION
        if seconds <= ends_at or close_by:
            points[-1] = (max(seconds, ends_at), step, tokens)
        else:
            points.append((seconds, step, tokens))
            if self._holds_first and len(points) > 3:
                self._holds_first = False
                points.popleft()
            while len(points) > 3 and seconds - points[1][0] >= _WINDOW:
                points.popleft()
        from_seconds, from_step, from_tokens = points[0]
        to_seconds, to_step, to_tokens = points[-1 if last else -2] if len(points) > 1 else points[0]
        elapsed = to_seconds - from_seconds
        if elapsed <= 0:
            return math.nan, math.nan
        return (to_step - from_step) / elapsed, (to_tokens - from_tokens) / elapsed
