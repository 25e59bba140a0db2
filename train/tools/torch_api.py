"""Which of torch's and Triton's functions and arguments the sources name and the installed version lacks.

Names are read from the source, so code that only a GPU runs is checked too.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("torch", "triton")
_SOURCES = Path(__file__).parents[2]


def missing_from_torch(folders: Iterable[Path] = ()) -> list[str]:
    """One line for each name or argument, with file:line; folders: by default kernels, model and train."""
    folders = tuple(folders) or tuple(_SOURCES / name for name in ("kernels", "model", "train"))
    return [
        f"{path.relative_to(folder.parent)}:{line}: {what}"
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        for line, what in _missing(ast.parse(path.read_text()))
    ]


def _missing(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _LIBRARIES:
            for alias in node.names:
                if _get(import_module(str(node.module)), str(node.module), alias.name) is None:
                    yield node.lineno, f"{node.module} has no {alias.name}"
        elif isinstance(node, ast.Attribute) and (name := _dotted(node)):
            if _resolve(name) is None:
                yield node.lineno, f"there is no {name}"
        elif isinstance(node, ast.Call) and (name := _dotted(node.func)):
            known = _arguments(_resolve(name), name)
            for keyword in node.keywords:
                if known is not None and keyword.arg and keyword.arg not in known:
                    yield node.lineno, f"{name} takes no {keyword.arg}"


def _dotted(node: ast.AST) -> str:
    """a.b.c of a chain of attributes that begins with a library, else empty."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not (parts and isinstance(node, ast.Name) and node.id in _LIBRARIES):
        return ""
    return ".".join([node.id, *reversed(parts)])


def _resolve(name: str) -> Any:
    """What a dotted name stands for; None if nothing."""
    module, *rest = name.split(".")
    found: Any = import_module(module)
    for part in rest:
        found, module = _get(found, module, part), f"{module}.{part}"
    return found


def _get(owner: Any, module: str, name: str) -> Any:
    """owner.name, imported where it is a module that has not been."""
    if not hasattr(owner, name):
        try:
            import_module(f"{module}.{name}")
        except ImportError:
            return None
    return getattr(owner, name)


def _arguments(function: Any, name: str) -> set[str] | None:
    """The names of its arguments; None where it takes any, or does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C++: its schemas, and what factories take
        schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name.rpartition('.')[2]}")
        names = {argument.name for schema in schemas for argument in schema.arguments}
        return (names and names | {"out", "dtype", "layout", "device", "pin_memory", "requires_grad"}) or None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}
