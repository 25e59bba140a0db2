"""Command-line arguments that several benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def absolute(path: str) -> Path:
    """For commands that run in another folder."""
    return Path(path).absolute()


_SHARED: dict[str, dict[str, Any]] = {
    "--out": {"type": absolute, "metavar": "DIR"},
    "--minutes": {"type": float, "metavar": "N", "help": "for all parts together"},
    "--parts": {
        "type": lambda names: names.split(","),
        "metavar": "A,B",
        "help": "only these, in this order",
    },
    "--peer": {"type": absolute, "metavar": "NANOGPT", "help": "a checkout of karpathy/nanoGPT"},
    "--text": {"type": absolute, "metavar": "FILE", "help": "the text of tiny Shakespeare"},
}


def make_parser(doc: str | None, *shared: str) -> argparse.ArgumentParser:
    """A parser with those of the shared arguments; `doc`, the docstring of a program, is its help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in shared:
        parser.add_argument(name, **_SHARED[name])
    return parser
