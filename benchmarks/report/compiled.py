"""What two releases of Triton make of the kernels, side by side, from two `fusedgpt kernels report --json`.

Usage: python -m benchmarks.report.compiled OLD.json NEW.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Key = tuple[str, ...]  # kernel, size, dtype, architecture


def worst(rows: Iterable[Mapping[str, Any]]) -> dict[Key, str]:
    """registers / bytes spilled / blocks per multiprocessor / predicted us: a kernel's worst."""
    found = defaultdict(list)
    for row in rows:
        kernel = row["kernel"].removeprefix("_").removesuffix("_kernel")
        size = row["label"].split(",")[0]
        found[kernel, size, row["dtype"], f"sm_{row['arch']}"].append(row)
    return {key: " / ".join(_worst(group)) for key, group in found.items()}


def _worst(group: list[Mapping[str, Any]]) -> Iterator[str]:
    for name, pick in (("registers", max), ("stack", max), ("blocks", min)):
        yield str(pick(row[name] for row in group))
    if predicted := [row["predicted"]["microseconds"]["H200"] for row in group if row["predicted"]]:
        yield f"{max(predicted):.0f}"


def side_by_side(old: dict[Key, str], new: dict[Key, str]) -> Iterator[str]:
    """A Markdown table with a column for each architecture; a cell that did not change is one value."""
    architectures = list(dict.fromkeys(key[3] for key in (*old, *new)))
    yield "| kernel | size | dtype | " + " | ".join(architectures) + " |"
    yield "|---" * (3 + len(architectures)) + "|"
    for kernel in dict.fromkeys(key[:3] for key in (*old, *new)):
        pairs = [(old.get((*kernel, a), "none"), new.get((*kernel, a), "none")) for a in architectures]
        yield "| " + " | ".join([*kernel, *(a if a == b else f"{a} -> {b}" for a, b in pairs)]) + " |"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(
        "registers / bytes spilled / blocks per multiprocessor / predicted us on an H200, where it is known\n"
    )
    print("\n".join(side_by_side(*(worst(json.loads(Path(path).read_text())) for path in sys.argv[1:]))))
