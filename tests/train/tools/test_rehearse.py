"""Training and sampling rehearsed without a GPU, in processes of their own: here kernels are interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# What a block launches in a forward and backward pass: ours and torch's, and those a rarer feature adds.
LAUNCHES_PER_BLOCK = {
    "training gpt2 bf16, dropout": 27,
    "training gpt2 bf16, no dropout": 27,
    "training gpt2 bf16, documents": 27,
    "training gpt2 bf16, checkpointing full": 36,
    "training 12M fp32": 26,
}

PLANTED = '''
import json, sys
from collections import Counter
from unittest.mock import patch

import torch
import triton
import triton.language as tl

from fusedgpt.model.gpt import GPT
from fusedgpt.train.loop.step import Step
from fusedgpt.train.tools.rehearse import Case, cases, rehearse_case

STEP = {case.name: case for case in cases(full=False)}["training gpt2 bf16, CUDA graph"]


@triton.jit
def tiled(x_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(x_ptr + tl.arange(0, N), x - tl.max(x))


@torch.library.custom_op("planted::tripled", mutates_args=())
def tripled(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)  # in x's strides


@tripled.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def planted(owner, name, spoilt):
    """The training step with a function replaced."""
    original = getattr(owner, name)

    def run(record, blocks):
        with patch.object(owner, name, lambda *args, **kwargs: spoilt(original, *args, **kwargs)):
            return STEP.run(record, blocks)

    return run


def on_gpu(use):
    """`use` of a tensor on the GPU."""
    def run(record, blocks):
        record.watching = True
        use(torch.ones(64, 8, device="cuda"))
        return Counter()

    return run


def read_loss(run, step, batch):
    result = run(step, batch)
    result[0].item()
    return result


def launch_something_new(run, step, batch):
    if torch.cuda.is_current_stream_capturing():
        tiled[(1,)](batch.shares.new_ones(64), N=64)
    return run(step, batch)


def count_on_the_host(forward, model, *args, **options):
    return forward(model, *args, **options) * torch.tensor(1.0)


RUNS = {
    "host value in a captured step": planted(Step, "run", read_loss),
    "kernel first seen in a capture": planted(Step, "run", launch_something_new),
    "CPU tensor in a step": planted(GPT, "forward", count_on_the_host),
    "CPU tensor for a kernel": on_gpu(lambda x: tiled[(1,)](x.new_ones(64, device="cpu"), N=64)),
    "strides": on_gpu(lambda x: tripled(x.T)),
    "does not compile": on_gpu(lambda x: tiled[(1,)](x, N=48)),
    "spills": on_gpu(lambda x: tiled[(1,)](x, N=1 << 14, num_warps=1)),
    "bool": on_gpu(lambda x: bool(x.sum())),
    "tolist": on_gpu(lambda x: x.tolist()),
    "cpu": on_gpu(lambda x: x.cpu()),
    "mask": on_gpu(lambda x: x[x > 0]),
    "nonzero": on_gpu(lambda x: x.nonzero()),
    "pageable": on_gpu(lambda x: torch.ones(8).to(x.device, non_blocking=True)),
    "synchronous": on_gpu(lambda x: torch.ones(8).pin_memory().to(x.device)),
    "numbers": on_gpu(lambda x: torch.tensor([1.0, 2.0], device=x.device)),
    "list index": on_gpu(lambda x: x[[1, 2]]),
    "synchronize": on_gpu(lambda x: torch.cuda.synchronize()),
    "fine": on_gpu(lambda x: x[1:].copy_(torch.ones(8).pin_memory(), non_blocking=True)),
}
found = {name: rehearse_case(Case(name=name, run=run), 90, set()).faults for name, run in RUNS.items()}
print(json.dumps(found))
'''


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=outside | environment)


def rehearse(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(Path(sys.executable).with_name("fusedgpt"), "kernels", "rehearse", *arguments, **environment)


@pytest.fixture(scope="module")
def rehearsed() -> list[dict[str, Any]]:
    """All cases for sm_90, a few for the others."""
    done = rehearse("--json", *("--arch", "90", "--arch", "80", "--arch", "100"))
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_no_step_fails_or_waits_on_any_architecture(rehearsed: list[dict[str, Any]]) -> None:
    assert not [result for result in rehearsed if result["faults"]]
    kinds = {word for result in rehearsed for word in result["case"].replace(",", "").split()}
    assert {
        "bf16",
        "fp16",
        "fp32",
        "documents",
        "checkpointing",
        "micro-batches",
        "graph",
        "sampling",
    } <= kinds
    for arch in (80, 90, 100):
        assert sum(result["kernels"] for result in rehearsed if result["arch"] == arch) > 10


@pytest.mark.parametrize("case", LAUNCHES_PER_BLOCK)
def test_a_block_launches_few_kernels(case: str, rehearsed: list[dict[str, Any]]) -> None:
    """Fewer is better: lower the figure then."""
    for result in rehearsed:
        if result["case"] == case:
            assert sum(result["block"].values()) == LAUNCHES_PER_BLOCK[case], result["block"]


def test_a_sampled_token_is_one_launch(rehearsed: list[dict[str, Any]]) -> None:
    found = [result["rest"] for result in rehearsed if result["case"].startswith("sampling")]
    assert found == [{"CUDA graph": 1}] * len(found)
    assert found


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The faults found in each planted case."""
    script = tmp_path_factory.mktemp("planted") / "planted.py"  # Triton reads a kernel's source from its file
    script.write_text(PLANTED)
    done = run(sys.executable, script)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("kernel first seen in a capture", "new: tiled is compiled in the capture of a CUDA graph"),
        ("CPU tensor in a step", "count_on_the_host: mul gets tensors of the GPU and of the CPU"),
        ("CPU tensor for a kernel", "tiled gets x_ptr on the CPU"),
        ("strides", "output 0 of planted::tripled is (torch.float32, (8, 64), (1, 8)), its fake kernel says"),
        ("does not compile", "tiled does not compile: CompilationError: "),
        ("spills", "tiled spills "),
        ("bool", "a value is read (item, bool, int or float): the host waits for the GPU"),
        ("tolist", "copy to the host, not asynchronous and pinned: the host waits"),
        ("cpu", "copy to the host, not asynchronous and pinned: the host waits"),
        ("mask", "indexing with a mask: the host waits"),
        ("nonzero", "nonzero: the host waits"),
        ("pageable", "copy from the host, not asynchronous and pinned: the host waits"),
        ("synchronous", "copy from the host, not asynchronous and pinned: the host waits"),
        ("numbers", "tensor on the GPU from numbers of the host: the host waits"),
        ("list index", "indexing with a list: the host waits"),
        ("synchronize", "torch.cuda.synchronize: the host waits"),
    ],
)
def test_a_planted_fault_is_found_where_it_is(case: str, fault: str, planted: dict[str, list[str]]) -> None:
    assert fault in planted[case][0]
    assert planted[case][0].startswith("__main__.py:")


def test_a_wait_is_found_in_eager_steps_and_in_a_capture(planted: dict[str, list[str]]) -> None:
    eager, captured = planted["host value in a captured step"][:2]
    where = "in read_loss: a value is read (item, bool, int or float)"
    assert eager.endswith(f"{where}: the host waits for the GPU")
    assert captured.endswith(f"{where}, forbidden in the capture of a CUDA graph")


def test_nothing_is_found_where_nothing_is_wrong(planted: dict[str, list[str]]) -> None:
    assert planted["fine"] == []


def test_errors_are_one_line() -> None:
    done = rehearse("--arch", "70")
    assert (done.returncode, done.stderr[:43]) == (1, "fusedgpt: no architecture 70; there are 80,")
    done = rehearse(TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert done.stderr == "fusedgpt: TRITON_INTERPRET=1 interprets the kernels; unset it to compile them\n"
