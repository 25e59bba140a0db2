"""The estimate against what autograd really keeps, known FLOP counts, and a table's cells."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedgpt.model.config import PRESETS, GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.batches import Cursor, StepBatch
from fusedgpt.train.loop.execution import checkpoint_activations
from fusedgpt.train.loop.optimizer import build_optimizer
from fusedgpt.train.loop.precision import cast_parameters
from fusedgpt.train.loop.step import Step
from fusedgpt.train.tools.estimate import (
    CHECKPOINTING,
    Row,
    Shapes,
    estimate,
    flops_per_token,
    peak_flops,
    recomputed_flops_per_token,
    table,
    workspace_bytes,
)

SMALL = GPTConfig(vocab_size=61, block_size=64, n_layer=2, n_head=2, n_embd=64, dropout=0.1)
WIDE = GPTConfig(vocab_size=300, block_size=64, n_layer=1, n_head=8, n_embd=128, dropout=0.0)


def kept_bytes(gpt: GPT, idx: Tensor, dtype: torch.dtype) -> int:
    """What autograd keeps of one forward pass, parameters, buffers and the batch itself not counted."""
    known = {x.untyped_storage()._cdata for x in (*gpt.parameters(), *gpt.buffers(), idx)}
    kept = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x  # alive, so that no other storage takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = gpt(idx, idx, dtype=dtype)
    assert loss.requires_grad
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in known)


def expected_bytes(shapes: Shapes, checkpointing: str) -> int:
    """By formula, with what the loss keeps: the gradients of hidden and of the embedding, in fp32.

    On a CPU it keeps hidden and a factor for each row, and the gradients where autograd does not see them.
    """
    N, C, P = shapes.B * shapes.T, shapes.config.n_embd, shapes.config.padded_vocab_size
    rest = P * C * 4 if shapes.on_gpu else N * 4
    return shapes.kept(checkpointing) + N * C * shapes.dtype.itemsize + rest


def assert_all_but_positions(measured: int, shapes: Shapes, checkpointing: str) -> None:
    """The formula leaves out the T position numbers, the dropout's seeds and a few scalars."""
    seeds = 16 * (1 + 3 * shapes.config.n_layer)
    assert 0 <= measured - expected_bytes(shapes, checkpointing) - 8 * shapes.T <= seeds + 24


def measure(shapes: Shapes, checkpointing: str) -> int:
    """kept_bytes of a model of these shapes."""
    gpt = GPT(shapes.config).train()
    for parameter in gpt.parameters():
        if parameter.ndim == 2 and parameter.dtype != shapes.weight_dtype:  # as on a GPU
            parameter.data = parameter.data.to(shapes.weight_dtype)
    checkpoint_activations(gpt, checkpointing)
    return kept_bytes(gpt, torch.zeros(shapes.B, shapes.T, dtype=torch.int64), shapes.dtype)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize(
    ("config", "B", "T", "dtype", "weight_dtype"),
    [
        (SMALL, 2, 16, torch.float32, torch.float32),
        (SMALL, 1, 40, torch.float16, torch.float16),
        (WIDE, 1, 24, torch.float16, torch.float32),
    ],
    ids=["fp32", "fp16", "fp16 of fp32 parameters"],
)
@pytest.mark.usefixtures("triton_kernels")
def test_activations_are_what_the_kernels_keep(
    config: GPTConfig, B: int, T: int, dtype: torch.dtype, weight_dtype: torch.dtype, checkpointing: str
) -> None:
    shapes = Shapes(config=config, B=B, T=T, dtype=dtype, weight_dtype=weight_dtype, on_gpu=True)
    assert_all_but_positions(measure(shapes, checkpointing), shapes, checkpointing)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("preset", ["12M", "gpt2-medium"])
@pytest.mark.usefixtures("triton_kernels")
def test_activations_of_presets(preset: str, checkpointing: str) -> None:
    """On tensors without data nothing is computed; fp16 for bf16, which the interpreter refuses."""
    shapes = Shapes(
        config=PRESETS[preset], B=16, T=512, dtype=torch.float16, weight_dtype=torch.float32, on_gpu=True
    )
    with FakeTensorMode():
        measured = measure(shapes, checkpointing)
    assert_all_but_positions(measured, shapes, checkpointing)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "T"), [(torch.float32, 64), (torch.bfloat16, 64), (torch.bfloat16, 256)], ids=str
)
def test_activations_on_a_cpu(dtype: torch.dtype, T: int, dropout: float, checkpointing: str) -> None:
    config = SMALL.model_copy(update={"dropout": dropout, "block_size": 256})
    shapes = Shapes(config=config, B=2, T=T, dtype=dtype, weight_dtype=torch.float32, on_gpu=False)
    assert_all_but_positions(measure(shapes, checkpointing), shapes, checkpointing)


def test_flops_are_nanogpts() -> None:
    gpt2 = PRESETS["gpt2"]
    assert flops_per_token(gpt2, 1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert flops_per_token(gpt2, 1024) == pytest.approx(8.6e8, rel=0.01)


def test_full_recomputes_the_blocks_but_for_their_last_matrix() -> None:
    gpt2 = PRESETS["gpt2"]
    blocks = 12 * (2 * 12 * 768**2 + 4 * 768 * 1024)
    c_proj = 12 * 2 * 768**2  # attention's; the MLP's is 4 times as large
    assert recomputed_flops_per_token(gpt2, 1024, "full") == blocks - 4 * c_proj
    assert recomputed_flops_per_token(gpt2, 1024, "selective") == blocks - 5 * c_proj
    assert recomputed_flops_per_token(gpt2, 1024, "none") == 0


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 0.0),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0.0),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", 0.0),
        ("cpu", 0.0),
    ],
)
def test_peak_flops(name: str, rate: float) -> None:
    assert peak_flops(name) == rate


def test_peak_flops_is_that_of_the_dtype() -> None:
    cublas = torch.backends.cuda.matmul
    before = cublas.fp32_precision
    try:
        for precision, rate in (("ieee", 67e12), ("tf32", 494.5e12)):
            cublas.fp32_precision = precision
            assert peak_flops("NVIDIA H200", torch.float32) == rate
            assert peak_flops("NVIDIA H200", torch.float16) == 989e12
    finally:
        cublas.fp32_precision = before


def rows(device_name: str = "NVIDIA H200", **options: Any) -> list[Row]:
    return estimate(PRESETS["gpt2"], TrainConfig(**{"batch_size": 64, **options}), 1024, device_name)


def test_rows_of_gpt2_on_an_h200() -> None:
    none, selective, full = rows()
    vectors = 12 * 13 * 768 + 2 * 768  # biases and norms: fp32
    matrices = 124_439_808 + (50304 - 50257) * 768 - vectors  # bf16, fp32 masters
    assert none.parameters == none.gradients == 2 * matrices + 4 * vectors
    assert none.optimizer == 12 * matrices + 8 * vectors
    M = 64 * 1024
    assert none.activations == M * (12 * (16 * 768 * 2 + 4 * 12 + 16) + 768 * 2 + 8)
    assert selective.activations == M * (12 * (4 * 768 * 2 + 16) + 768 * 2 + 8)
    # The first block has one input, the last norm a row; 11 blocks get a bias.
    assert full.activations == M * (12 * 2 * 768 * 2 + 8) + 11 * 768 * 4
    assert none.loss < 2e9  # the target in benchmarks/README.md
    assert none.total > selective.total > full.total
    for row in (none, selective, full):
        parts = row.parameters + row.optimizer + row.activations
        assert parts < row.total < 1.3 * (parts + row.gradients + row.loss)


@pytest.mark.parametrize(
    ("name", "mebibytes"),
    [
        ("NVIDIA H200", 64), ("NVIDIA H100 80GB HBM3", 64), ("NVIDIA GH200 480GB", 64), ("NVIDIA B200", 64),
        ("NVIDIA A100-SXM4-40GB", 16.25), ("NVIDIA L4", 16.25), ("cpu", 0),
    ],
)  # fmt: skip
def test_workspaces_of_cublas(name: str, mebibytes: float) -> None:
    assert workspace_bytes(name) == mebibytes * 2**20
    without = rows("NVIDIA L4")[0].total - workspace_bytes("NVIDIA L4")
    assert name == "cpu" or rows(name)[0].total - without == mebibytes * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize(("preset", "B", "T"), [("12M", 32, 256), ("gpt2", 4, 1024)])
def test_the_peak_is_what_torch_counts(preset: str, B: int, T: int, checkpointing: str) -> None:
    """Of eager steps; a few percent more for tensors that are rounded up to whole MiB."""
    torch._C._cuda_clearCublasWorkspaces()
    before, config = torch.cuda.memory_allocated(), TrainConfig(batch_size=B)
    model = GPT(PRESETS[preset]).cuda().train()
    cast_parameters(model, torch.bfloat16)
    checkpoint_activations(model, checkpointing)
    step = Step(partial(model, dtype=torch.bfloat16), build_optimizer(model, config), config)
    ids = torch.zeros(B, T, dtype=torch.int64, device="cuda")
    batch = StepBatch.collect([(ids, ids)], Cursor())
    step(batch, 1e-4)
    torch.cuda.reset_peak_memory_stats()
    step(batch, 1e-4)
    measured = torch.cuda.max_memory_allocated() - before
    expected = estimate(PRESETS[preset], config, T, torch.cuda.get_device_name())
    (row,) = (row for row in expected if row.checkpointing == checkpointing)
    assert 0.98 * row.total < measured < 1.04 * row.total


def test_predicted_time_of_a_step() -> None:
    none, selective, full = rows(batch_tokens=1 << 19)
    assert none.seconds_per_step == pytest.approx((1 << 19) * 8.55e8 / (0.4 * 989e12), rel=0.001)
    assert none.relative_time == 1.0 < selective.relative_time < full.relative_time < 4 / 3
    assert rows("cpu")[0].seconds_per_step is None
    assert rows(precision="fp32")[0].seconds_per_step is None  # the table has bf16's rates only


def test_accumulated_gradients_are_fp32_and_there_all_the_time() -> None:
    one, many = rows()[0], rows(batch_tokens=1 << 19)[0]
    assert many.activations == one.activations
    assert many.gradients == 4 * (124_439_808 + 47 * 768)
    assert many.total == one.total + many.gradients


def test_a_cpu_has_fp32_parameters() -> None:
    row = rows("cpu", precision="bf16", batch_size=1)[0]
    assert row.parameters == row.gradients == row.optimizer // 2 == 4 * (124_439_808 + 47 * 768)


def test_table_has_a_cell_for_everything_known() -> None:
    on_gpu, on_cpu = table(rows()), table(rows("cpu"))
    assert [row["checkpointing"] for row in on_gpu] == ["none", "selective", "full"]
    assert on_gpu[0]["activations"] == "19.48 GB"
    assert on_gpu[2]["time (prediction)"] == "1.18x"
    assert all(cell for row in on_gpu for cell in row.values())
    assert {name for name, cell in on_cpu[0].items() if not cell} == {
        "ms/step (prediction)",
        "tokens/s (prediction)",
    }
