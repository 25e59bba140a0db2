"""The kernel report, in processes of its own: in this one the kernels may be interpreted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PLANTED = """
import sys

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedgpt.kernels import tuning

from fusedgpt.kernels.tools import report as inspect
from fusedgpt.train.cli.main import main


@triton.jit
def spilling(x_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(x_ptr + tl.arange(0, N), x - tl.max(x))


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, BLOCK_K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m * K + start + k)
        total = tl.dot(a, tl.load(b_ptr + (start + k)[:, None] * N + n), total)
    tl.store(c_ptr + m * N + n, total)


@triton.jit
def copy_through_descriptors(source, target, N: tl.constexpr):
    target.store([0, 0], source.load([0, 0]) + 1.0)


@triton.jit
def misspelt(x_ptr):
    tl.store(x_ptr, tl.lod(x_ptr))


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def planted(dtype, full):
    x = meta(1 << 15)
    wide, half = meta(256, 128), meta(128, 64, dtype=torch.float16)
    warps = 4 if tuning.capability(x.device) < (10, 0) else 8
    descriptor = TensorDescriptor.from_tensor(half, [64, 64])
    everything = {
        "spilling": lambda: spilling[(1,)](x, N=1 << 14, num_warps=1),
        "unaligned": lambda: spilling[(1,)](x[1:], N=128),
        "matmul": lambda: matmul[(1,)](half, half, x, M=64, N=64, K=512, BLOCK_K=64, num_warps=warps),
        "big": lambda: matmul[(1,)](wide, wide, x, M=256, N=128, K=128, BLOCK_K=128, num_warps=16),
        "descriptors": lambda: copy_through_descriptors[(1,)](descriptor, descriptor, N=64),
        "unlaunched": lambda: misspelt[(1,)](x, len(None)),
        "misspelt": lambda: misspelt[(1,)](x),
    }
    for name in NAMES:
        yield name, everything[name]


NAMES = sys.argv[1].split(",")
inspect.LAUNCHES = {"planted": planted}
inspect._DTYPES = {"fp32": torch.float32}
sys.argv[1:] = ["kernels", "report", *sys.argv[2:]]
main()
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(Path(sys.executable).with_name("fusedgpt"), "kernels", "report", *arguments)


def report_planted(folder: Path, names: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "planted.py").write_text(PLANTED)  # Triton reads the source of a kernel from its file
    return run(sys.executable, folder / "planted.py", names, *arguments)


def rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def shipped() -> list[dict[str, Any]]:
    """The kernels as they ship; `--check` has found nothing against them.

    Of fp32 only on 9.0: scripts/test_versions compiles all, which takes minutes more.
    """
    others = "--arch", "80", "--arch", "100", "--dtype", "bf16"
    return [row for only in (("--arch", "90"), others) for row in rows(report("--check", "--json", *only))]


def test_nothing_spills_and_everything_fits(shipped: list[dict[str, Any]]) -> None:
    for row in shipped:
        assert 10 < row["registers"] <= 255, row
        assert row["stack"] == 0, row
        assert row["unaligned"] == [], row
        assert "warps=" in row["config"]


def test_every_kernel_is_compiled_for_every_architecture(shipped: list[dict[str, Any]]) -> None:
    kernels = {row["kernel"] for row in shipped}
    assert {"_attention_fwd_kernel", "_layer_norm_bwd_kernel", "_adamw_kernel"} < kernels
    for kernel in kernels:
        compiled = {(row["arch"], row["dtype"]) for row in shipped if row["kernel"] == kernel}
        assert {arch for arch, _ in compiled} == {80, 90, 100}, kernel
        assert "bf16" in {dtype for _, dtype in compiled}, kernel


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kernel", ["fwd", "dkdv", "dq"])
def test_attention_uses_each_architectures_tensor_cores(
    kernel: str, D: int, shipped: list[dict[str, Any]]
) -> None:
    instructions = {80: "mma.sync bf16", 90: "wgmma.mma_async bf16", 100: "tcgen05.mma f16"}
    for arch, instruction in instructions.items():
        found = [
            row
            for row in shipped
            if (row["kernel"], row["arch"], row["dtype"]) == (f"_attention_{kernel}_kernel", arch, "bf16")
            and row["label"].split(",")[0] == f"D {D}"
        ]
        assert len(found) >= 3  # plain, documents, dropout
        for row in found:
            assert list(row["tensor_core"]) == [instruction], row
            assert next(iter(row["loads"])) == ("16" if arch == 80 else "tma"), row


def test_half_precision_rows_are_loaded_16_bytes_at_once(shipped: list[dict[str, Any]]) -> None:
    rows_of = ("_layer_norm_fwd", "_layer_norm_bwd", "_cross_entropy", "_dropout", "_bias_gelu")
    found = [row for row in shipped if row["kernel"].startswith(rows_of) and row["dtype"] == "bf16"]
    assert len(found) > 20
    for row in found:
        assert next(iter(row["loads"])) == "16", row
        assert row["tensor_core"] == {}


def test_a_row_of_layer_norm_belongs_to_one_warp(shipped: list[dict[str, Any]]) -> None:
    """Its means need no shared memory, which only turns them into the order in which they are stored."""
    found = [row for row in shipped if row["kernel"] == "_layer_norm_fwd_kernel" and row["dtype"] == "bf16"]
    assert len(found) > 20
    for row in found:
        assert row["shared"] == 16, row


def test_two_blocks_of_hoppers_dq_share_a_multiprocessor(shipped: list[dict[str, Any]]) -> None:
    """In the shape that GPT-2 trains with."""
    of = ("_attention_dq_kernel", 90, "bf16", "D 64")
    (found,) = (row for row in shipped if (row["kernel"], row["arch"], row["dtype"], row["label"]) == of)
    assert found["blocks"] == 2


def test_adamw_accesses_full_blocks_16_bytes_at_once() -> None:
    """16-byte accesses alone move every byte of a full block, and, for the update, of the partial sums.

    What is narrower belongs to masked tails and to the table.
    """
    found = rows(report("--kernel", "adamw", "--full", "--json"))
    kinds = set()
    for row in found:
        grad_dtype = row["label"].removesuffix(" gradient")
        param, grad = (2 if "16" in dtype else 4 for dtype in (row["dtype"], grad_dtype))
        block, partials, warps = (
            int(n) for n in re.findall(r" (?:BLOCK|PARTIALS|warps)=(\d+)", row["config"])
        )
        update = row["kernel"] == "_adamw_kernel"
        loaded = block * (grad + 12 * update) + 4 * partials * update  # both moments and the master
        stored = block * (12 + (param if param == 2 else 0)) * update
        assert row["loads"]["16"] * 16 * 32 * warps == loaded, row
        assert row["stores"].get("16", 0) * 16 * 32 * warps == stored, row
        assert row["stack"] == 0, row
        kinds.add((row["arch"], row["kernel"], row["dtype"], grad))
    assert len(kinds) == 3 * 2 * 5  # both kernels: fp32, and bf16 and fp16 with gradients in 16 and 32 bits


def test_bf16_kernels_on_hopper_have_a_prediction(shipped: list[dict[str, Any]]) -> None:
    for row in shipped:
        assert (row["predicted"] is not None) == (row["arch"] == 90 and row["dtype"] == "bf16"), row
    attention = [row for row in shipped if row["predicted"] and "_attention_fwd" in row["kernel"]]
    for row in attention:
        assert row["loop"]["tensor"] > 0
        assert 50e6 < row["predicted"]["flops"] / row["predicted"]["microseconds"]["H200"] < 800e6, row


def test_every_file_with_kernels_is_inspected() -> None:
    folder = Path(__file__).parents[3] / "kernels"
    with_kernels = {path.stem for path in folder.glob("*.py") if "_kernel(\n" in path.read_text()}
    listed = report("--kernel", "none").stderr.split("there are ")[1]
    assert set(listed.strip().split(", ")) == with_kernels


def test_a_spill_fails_the_check(tmp_path: Path) -> None:
    done = report_planted(tmp_path, "spilling", "--check", "--arch", "90")
    assert done.returncode == 1
    assert done.stderr.startswith("fusedgpt: spilling (fp32, spilling, sm_90) spills ")
    assert re.search(r"^spilling +spilling +64 +32 +spills ", done.stdout, re.MULTILINE)


def test_too_much_shared_memory_fails_the_check_where_it_is_too_much(tmp_path: Path) -> None:
    done = report_planted(tmp_path, "big", "--check", "--arch", "80", "--arch", "90")
    assert done.returncode == 1
    assert "sm_80) needs 192 KiB of shared memory, the limit is 163" in done.stderr
    assert "sm_90" not in done.stderr


def test_a_kernel_that_does_not_compile_fails_the_check(tmp_path: Path) -> None:
    done = report_planted(tmp_path, "misspelt,unlaunched,unaligned", "--check", "--arch", "80")
    assert done.returncode == 1
    assert "misspelt, sm_80) does not compile: CompilationError: " in done.stderr
    assert "in `tl.store(x_ptr, tl.lod(x_ptr))`" in done.stderr
    assert "planted (fp32, unlaunched, sm_80) does not compile: TypeError: object of" in done.stderr
    assert "unaligned" in done.stdout  # one failure hides no other kernel


def test_instructions_and_widths_are_read(tmp_path: Path) -> None:
    archs = ("--arch", "80", "--arch", "90", "--arch", "100")
    found = rows(report_planted(tmp_path, "matmul,descriptors,unaligned,matmul", "--json", *archs))
    by_name = {(row["kernel"], row["arch"]): row for row in found}
    assert len(by_name) == len(found)  # launched twice is still one row
    kinds = ["mma.sync f16", "wgmma.mma_async f16", "tcgen05.mma f16"]
    for arch, kind in zip((80, 90, 100), kinds, strict=True):
        matmul, unaligned = by_name["matmul", arch], by_name["spilling", arch]
        assert f"warps={8 if arch == 100 else 4} " in matmul["config"]  # chosen for the arch
        assert list(matmul["tensor_core"]) == [kind]
        # 64 x 64 x 512 in steps of m64n64k16, or of m16n8k16 in four warps; unrolled, or four in a step
        products = matmul["loop"] if arch == 100 else matmul["straight"]
        assert products["tensor"] == {80: 256, 90: 32, 100: 4}[arch]
        assert matmul["blocks"] >= 4
        assert matmul["loads"].keys() == {"16"}
        assert matmul["shared"] >= 64 * 64 * 2
        assert unaligned["unaligned"] == ["x_ptr"]
        assert unaligned["loads"].keys() == {"4"}
        descriptors = by_name["copy_through_descriptors", arch]
        assert ("tma" in descriptors["loads"]) == ("tma" in descriptors["stores"]) == (arch >= 90)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--kernel dropouts", "no kernel file 'dropouts'; there are activation, "),
        ("--arch 70", "no architecture 70; there are 80, 86"),
    ],
)
def test_errors_are_one_line(arguments: str, message: str) -> None:
    done = report(*arguments.split())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"fusedgpt: {message}")


def test_interpreted_kernels_cannot_be_compiled() -> None:
    command = [Path(sys.executable).with_name("fusedgpt"), "kernels", "report"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 1
    assert done.stderr == "fusedgpt: TRITON_INTERPRET=1 interprets the kernels; unset it to compile them\n"
