"""Which instructions a compiled kernel executes: its machine code (SASS), in loops and by execution unit."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import triton

# By execution unit, the first match counts. fp32, imad and alu are pipes of their own on 8.0 to 10.x.
_UNITS = {
    "tensor": r"(H|I|Q|D|O)G?MMA|UTC\w*MMA",
    "mufu": r"MUFU|F2F|F2I|I2F|FRND",  # the unit of exp2, division and width-changing conversions
    "fp32": r"F(ADD|MUL|FMA)2?|H(ADD|MUL|FMA)2|HFMA2",
    "imad": r"IMAD",
    "wait": r"\w*BAR|WARPGROUP|WARPSYNC|SYNCS|FENCE|NANOSLEEP|BSSY|BSYNC",
    "global": r"LDG|STG|LDGSTS|RED|ATOMG?|UTMA\w+|UBLKCP|LDL|STL",
    "shared": r"LDSM?|STSM?|SHFL|ATOMS|LDTM|STTM",
    "other": r"U\w+|R2UR|S2U?R|CS2R|LDCU?|VOTE\w*|ELECT|BRA|EXIT|CALL|RET|NOP|LEPC|BPT|D(ADD|MUL|FMA|SETP)",
    "alu": r"\w+",  # integer addition, logic, comparison, selection, minimum, packing
}
UNITS = tuple(_UNITS)
_UNIT = re.compile("|".join(f"(?P<{unit}>(?:{names})$)" for unit, names in _UNITS.items()))

_LINE = re.compile(r"^(?:(\.L_x_\d+):|\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ +)?([A-Z]\w*)([.\w]*)([^;]*))")
_CONTROL = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_NO_BARRIER = 0xFE2 << 40
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_WARPGROUP_MMA = re.compile(r"\.(\d+)x(\d+)x(\d+)")
_WARP_MMA = re.compile(r"\.(\d+?)(8|16)(8|16|32)\b")  # HMMA.16816: m 16, n 8, k 16


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp."""

    predicate: str  # e.g. "@!P0 ", or ""
    name: str  # e.g. "LDG"
    modifiers: str  # e.g. ".E.128"
    operands: str
    control: int = _NO_BARRIER  # the upper 64 bits of the encoding

    @cached_property
    def unit(self) -> str:
        """One of UNITS."""
        found = _UNIT.match(self.name)
        return str(found.lastgroup) if found else "alu"

    # Scheduling: Jia et al. 2018, "Dissecting the NVIDIA Volta GPU Architecture" (arXiv 1804.06826), 2.1.

    @cached_property
    def stall(self) -> int:
        """Cycles until this warp may issue its next instruction."""
        return max(1, self.control >> 41 & 15)

    @cached_property
    def barriers(self) -> tuple[int, int]:
        """The barriers released when its result is written and when its operands are read; 7: none."""
        return self.control >> 46 & 7, self.control >> 49 & 7

    @cached_property
    def waits(self) -> tuple[int, ...]:
        """The barriers that must be released before it is issued."""
        return tuple(i for i in range(6) if self.control >> 52 + i & 1)

    @cached_property
    def width(self) -> int:
        """Bytes per thread of an access to memory."""
        if bits := re.search(r"\.U?S?(8|16|32|64|128)\b", self.modifiers):
            return int(bits[1]) // 8
        return 4

    @cached_property
    def flops(self) -> int:
        """Of a matrix product, per warp."""
        if self.unit != "tensor":
            return 0
        if size := _WARPGROUP_MMA.search(self.modifiers):
            return 2 * int(size[1]) * int(size[2]) * int(size[3]) // 4  # four warps share it
        if size := _WARP_MMA.search(self.modifiers):
            return 2 * int(size[1]) * int(size[2]) * int(size[3])
        return 0


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What one warp executes in a stretch of code."""

    code: tuple[Instruction, ...]
    units: dict[str, int]  # instructions by unit
    flops: int  # of matrix products
    loaded: int  # bytes of global memory per thread, without the tensor memory accelerator
    stored: int
    shared_cycles: int  # of the unit for shared memory, 128 bytes per cycle
    overlapped: int  # instructions between the start of a matrix product and the wait for it
    overlapped_mufu: int

    @property
    def instructions(self) -> int:
        return sum(self.units.values())


@dataclass(frozen=True, kw_only=True)
class Code:
    """A kernel: its hot loop, the other loops with matrix products, and all outside of loops."""

    hot: Mix | None  # None: no loop
    others: tuple[Mix, ...]
    straight: Mix


def read(compiled: Any) -> Code:
    """The code of a CompiledKernel.

    The hot loop has the most tensor-core instructions per iteration, then the most bytes loaded from and
    stored to global memory, then the fewest instructions: full tiles need no mask. A loop inside it, and
    polling a barrier, is no part of it.
    """
    cubin = Path(next(path for name, path in compiled.metadata_group.items() if name.endswith(".cubin")))
    kept = cubin.with_suffix(".sass")  # in Triton's cache: nvdisasm takes a third of a second
    if not kept.exists():
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-hex", "-ndf", cubin]
        written = cubin.with_suffix(f".{os.getpid()}")
        written.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
        written.replace(kept)
    return parse(kept.read_text())


def parse(text: str) -> Code:
    """The code in the output of `nvdisasm -c -hex -ndf`."""
    instructions, labels = _instructions(text)
    successors = _successors(instructions, labels)
    loops = _loops(successors)
    bodies = []
    for loop in loops:
        inside = set[int]().union(*(other for other in loops if other < loop))
        bodies.append(_mix([instructions[i] for i in sorted(loop - inside)], cyclic=True))
    bodies.sort(key=lambda mix: (-mix.units.get("tensor", 0), -mix.loaded, -mix.stored, mix.instructions))
    bodies = [mix for mix in bodies if mix.units.keys() - {"wait", "other"}]  # the others poll a barrier
    outside = _reach(successors, 0, set()).difference(*loops)
    return Code(
        hot=bodies[0] if bodies else None,
        others=tuple(mix for mix in bodies[1:] if "tensor" in mix.units),
        straight=_mix([instructions[i] for i in sorted(outside)], cyclic=False),
    )


def _instructions(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and label -> index of the instruction after it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _LINE.match(line):
            label, predicate, name, modifiers, operands = found.groups()
            if label:
                labels[label] = len(instructions)
            else:
                instructions.append(Instruction(predicate or "", name, modifiers, operands))
        elif found := _CONTROL.match(line):
            instructions[-1] = replace(instructions[-1], control=int(found[1], 16))
    return instructions, labels


def _successors(instructions: list[Instruction], labels: dict[str, int]) -> list[list[int]]:
    """Which instructions may follow each one."""
    successors = []
    for i, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.operands) if instruction.name == "BRA" else None
        following = [labels[target[1]]] if target else []
        leaves = instruction.name in ("BRA", "EXIT", "RET") and not instruction.predicate
        if not leaves or "P" in instruction.operands.split("`")[0]:  # a branch may have a predicate there
            following.append(i + 1)
        successors.append([j for j in following if j < len(instructions)])
    return successors


def _loops(successors: list[list[int]]) -> list[frozenset[int]]:
    """The natural loops: of each branch back to an instruction that is on every way to the branch."""
    before: list[list[int]] = [[] for _ in successors]
    for i, following in enumerate(successors):
        for j in following:
            before[j].append(i)
    reachable = _reach(successors, 0, set())
    loops: dict[int, set[int]] = {}
    for i in sorted(reachable):
        for head in successors[i]:
            if head <= i and i not in _reach(successors, 0, {head}):
                loops.setdefault(head, {head}).update(_reach(before, i, {head}) & reachable)
    return [frozenset(loop) for loop in loops.values()]


def _reach(edges: list[list[int]], start: int, barred: set[int]) -> set[int]:
    """`start` and what is reached from it without `barred`."""
    found: set[int] = set()
    pending = [start]
    while pending:
        i = pending.pop()
        if i not in found and i not in barred:
            found.add(i)
            pending += edges[i]
    return found


def _mix(instructions: list[Instruction], *, cyclic: bool) -> Mix:
    loads = [i for i in instructions if i.name in ("LDG", "LDGSTS")]
    stores = [i for i in instructions if i.name == "STG"]
    shared = [i for i in instructions if i.unit == "shared"]
    overlapped = _overlapped(instructions, cyclic)
    return Mix(
        code=tuple(instructions),
        units=dict(Counter(i.unit for i in instructions)),
        flops=sum(i.flops for i in instructions),
        loaded=sum(i.width for i in loads),
        stored=sum(i.width for i in stores),
        shared_cycles=sum(4 if i.name in ("LDSM", "STSM") else max(1, i.width // 4) for i in shared),
        overlapped=len(overlapped),
        overlapped_mufu=sum(i.unit == "mufu" for i in overlapped),
    )


def _overlapped(instructions: list[Instruction], cyclic: bool) -> list[Instruction]:
    """What is issued while a group of a warpgroup's matrix products runs that is not waited for yet."""
    found: list[Instruction] = []
    running = 0  # groups
    for _ in range(2 if cyclic else 1):  # the second time round, a group may be left from the first
        found.clear()
        for instruction in instructions:
            if instruction.name == "HGMMA":
                running += "gsb0" in instruction.operands
            elif instruction.name == "WARPGROUP" and "DEPBAR" in instruction.modifiers:
                running = min(running, int(instruction.operands.split(",")[1], 0))
            elif running:
                found.append(instruction)
    return found
