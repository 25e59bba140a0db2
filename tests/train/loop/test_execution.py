"""Activation checkpointing, compiled blocks, captured steps: when, and that they change no gradient."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiling import INDUCTOR_GRAPHS
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from training_runs import counting

from fusedgpt.kernels import ops
from fusedgpt.kernels.errors import InputError
from fusedgpt.model.config import GPTConfig
from fusedgpt.model.generate import generate
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.execution import (
    checkpoint_activations,
    choose_compile,
    choose_cuda_graphs,
    compile_each_block,
    executed,
    no_garbage_collection,
)
from fusedgpt.train.loop.trainer import train
from fusedgpt.train.report.progress import Monitor, StepMetrics

Forward = Callable[..., Tensor]
IDS = torch.arange(24).view(2, 12)
THREE_LAYERS = GPTConfig(vocab_size=61, block_size=16, n_layer=3, n_head=3, n_embd=24, dropout=0.1)
TWO_LAYERS = THREE_LAYERS.model_copy(update={"n_layer": 2})
ONE_LAYER = THREE_LAYERS.model_copy(update={"n_layer": 1})  # Triton's interpreter takes a second per block
CONFIG = GPTConfig(vocab_size=61, block_size=16, n_layer=3, n_head=2, n_embd=32, dropout=0.2)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


def on_gpu(config: GPTConfig) -> Any:
    """A model of that size as the choices see one that is on a GPU."""
    weight = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    return SimpleNamespace(config=config, wte=SimpleNamespace(weight=weight))


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")


def test_a_cpu_compiles_nothing_unasked() -> None:
    model = GPT(CONFIG)
    assert choose_compile(TrainConfig(), model, 10**9, 16) == "off"
    assert choose_compile(TrainConfig(compile="model"), model, 1, 16) == "model"


@pytest.mark.usefixtures("h200")
def test_a_gpu_compiles_long_runs() -> None:
    gpt2 = on_gpu(GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024))
    assert choose_compile(TrainConfig(batch_size=64), gpt2, 100, 1024) == "off"
    assert choose_compile(TrainConfig(batch_size=64), gpt2, 100_000, 1024) == "block"


@pytest.mark.parametrize(
    ("device", "cuda_graphs", "profiled", "expected"),
    [
        ("cuda", "auto", False, True),
        ("cuda", "auto", True, False),
        ("cuda", "on", True, True),
        ("cuda", "off", False, False),
        ("cpu", "auto", False, False),
        ("cpu", "off", False, False),
    ],
)
def test_a_gpu_captures_its_steps(device: str, cuda_graphs: str, profiled: bool, expected: bool) -> None:
    config = TrainConfig.model_validate({"cuda_graphs": cuda_graphs})
    assert choose_cuda_graphs(config, torch.device(device), profiled=profiled) == expected
    if cuda_graphs != "on":
        assert not choose_cuda_graphs(config, torch.device(device), profiled=profiled, ranks=2)


def test_a_cpu_and_ranks_capture_nothing() -> None:
    with pytest.raises(InputError, match="--cuda-graphs on needs a CUDA device"):
        choose_cuda_graphs(TrainConfig(cuda_graphs="on"), torch.device("cpu"))
    with pytest.raises(InputError, match="--cuda-graphs on needs one process"):
        choose_cuda_graphs(TrainConfig(cuda_graphs="on"), torch.device("cuda"), ranks=2)


class Losses(Monitor):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.seen: list[float] = []

    def update(self, metrics: StepMetrics) -> None:
        self.seen.append(metrics.loss)


@pytest.mark.parametrize("mode", ["block", "model"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiling_changes_no_loss_and_happens_once(
    mode: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations every few steps, and epochs that end in a smaller batch, lead to no other compile."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: real(fn, backend=backend, **options))
    curves = []
    for compile_mode in ("off", mode):
        config = TrainConfig.model_validate(
            {
                "steps": 20, "batch_size": 7, "batch_tokens": 7 * 16, "eval_every": 4, "device": "cpu",
                "precision": "fp32", "compile": compile_mode, "checkpointing": checkpointing,
            }
        )  # fmt: skip
        monitor = Losses()
        torch._dynamo.reset()
        train(GPT(CONFIG, seed=1), counting(), config, monitor)
        curves.append(monitor.seen)
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    n_shapes = 2  # the last batch of an epoch is smaller
    n_graphs = 2 if mode == "block" else 1  # the first block, and all others
    assert 1 <= len(compiled) <= n_shapes * n_graphs


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_captured_step_is_the_step(device: torch.device, precision: str) -> None:
    """Varying learning rate, dropout, clipping, loss scale and smaller batches, to the bit."""
    curves = []
    for graphs in ("off", "on"):
        config = TrainConfig.model_validate(
            {
                "steps": 60, "batch_size": 3, "batch_tokens": 8 * 16, "eval_every": 7, "device": "cuda",
                "precision": precision, "compile": "off", "cuda_graphs": graphs, "grad_clip": 0.5,
                "learning_rate": 1e-2,
            }
        )  # fmt: skip
        monitor = Losses()
        train(GPT(CONFIG, seed=1), counting(), config, monitor)
        curves.append(monitor.seen)
    assert curves[0] == curves[1]


def loss_and_gradients(gpt: GPT, forward: Forward | None = None, steps: int = 1) -> list[Tensor]:
    """Of the last of a few training steps without updates; each draws its own masks."""
    forward = gpt if forward is None else forward
    for _ in range(steps):
        gpt.zero_grad()
        loss = forward(IDS, IDS.flip(1))
        loss.backward()
    return [loss.detach(), *(p.grad for p in gpt.parameters() if p.grad is not None)]


def trained(checkpointing: str, dtype: torch.dtype, compiled: str = "", **options: Any) -> list[Tensor]:
    """loss_and_gradients of the second step of a fresh model of two layers."""
    gpt = GPT(TWO_LAYERS, seed=1).train()
    checkpoint_activations(gpt, checkpointing)
    forward = torch.compile(gpt, fullgraph=True, **options) if compiled == "model" else gpt
    if compiled == "block":
        compile_each_block(gpt, **options)
    return loss_and_gradients(gpt, partial(forward, dtype=dtype), steps=2)


def assert_same_bits(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert [i for i, (x, y) in enumerate(zip(ours, expected, strict=True)) if not torch.equal(x, y)] == []


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize(
    ("compiled", "dtype"),
    [
        ("", torch.float32),
        ("", torch.bfloat16),
        ("block", torch.float32),
        ("block", torch.bfloat16),
        ("model", torch.bfloat16),
    ],
)
def test_checkpointing_changes_no_gradient(checkpointing: str, dtype: torch.dtype, compiled: str) -> None:
    """Compiled against compiled: a compiled fp32 matmul is MKL's on a CPU, an eager one oneDNN's."""
    plain = trained("none", dtype, compiled, backend="aot_eager")
    assert_same_bits(trained(checkpointing, dtype, compiled, backend="aot_eager"), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("triton_kernels")
def test_checkpointing_changes_no_gradient_of_the_kernels(dtype: torch.dtype) -> None:
    results = []
    for checkpointing, compiled in (("none", False), ("selective", False), ("none", True), ("full", True)):
        gpt = GPT(ONE_LAYER, seed=1).train()
        checkpoint_activations(gpt, checkpointing)
        if compiled:
            compile_each_block(gpt, backend="aot_eager")
        results.append(loss_and_gradients(gpt, partial(gpt, dtype=dtype)))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[3], results[2])


@pytest.mark.parametrize(
    ("checkpointing", "attentions", "up_projections", "output_projections"),
    [("none", 3, 3, 6), ("selective", 6, 6, 6), ("full", 6, 6, 9)],  # full: attention's, not the MLP's
)
def test_what_checkpointing_computes_twice(
    checkpointing: str,
    attentions: int,
    up_projections: int,
    output_projections: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bf16: the fp32 matmul of a CPU (kernels/cpu/linear.py) keeps its inputs only once it has run."""
    calls: list[str] = []

    def count(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            out = original(*args, **kwargs)  # early stop raises out of it
            calls.append(f"{name} {tuple(out.shape)}")
            return out

        return counted

    for name in ("qkv_attention", "linear"):
        monkeypatch.setattr(ops, name, count(name, getattr(ops, name)))
    gpt = GPT(THREE_LAYERS, seed=1).train()
    checkpoint_activations(gpt, checkpointing)
    loss_and_gradients(gpt, partial(gpt, dtype=torch.bfloat16))
    assert calls.count("qkv_attention (2, 12, 3, 8)") == attentions
    assert calls.count("linear (2, 12, 72)") == attentions
    assert calls.count("linear (2, 12, 96)") == up_projections
    assert calls.count("linear (2, 12, 24)") == output_projections


def test_nothing_is_recomputed_without_a_backward_pass(
    tiny_gpt: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("checkpoint was called")

    monkeypatch.setattr("fusedgpt.train.loop.execution.checkpoint", refuse)
    checkpoint_activations(tiny_gpt, "full")
    tiny_gpt(IDS, IDS)
    list(generate(tiny_gpt, IDS, max_new_tokens=3))
    with torch.no_grad():
        tiny_gpt.train()(IDS, IDS)
    with pytest.raises(AssertionError, match="checkpoint was called"):
        tiny_gpt(IDS, IDS)


def test_the_model_is_plain_again_afterwards(tiny_gpt: GPT) -> None:
    with executed(tiny_gpt, checkpointing="selective", compile_blocks=True):
        assert "forward" in vars(tiny_gpt.blocks()[1])
        assert "forward" in vars(tiny_gpt.blocks()[1].mlp)
    assert not any("forward" in vars(module) for module in tiny_gpt.modules())


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", ["block", "model"])
def test_all_layers_but_the_first_share_a_graph(checkpointing: str, compiled: str) -> None:
    """And evaluation, sampling and training without gradients in between compile nothing more."""
    gpt = GPT(THREE_LAYERS, seed=1).train()
    checkpoint_activations(gpt, checkpointing)
    counter = CompileCounter()
    forward: Forward = gpt
    if compiled == "block":
        compile_each_block(gpt, backend=counter)
    else:
        forward = torch.compile(gpt, backend=counter, fullgraph=True, dynamic=False)
    for _ in range(2):
        loss_and_gradients(gpt, forward)
        gpt.eval()
        gpt(IDS, IDS)
        gpt(IDS[:, :5])
        list(generate(gpt, IDS, max_new_tokens=6))
        with torch.no_grad():
            gpt.train()(IDS, IDS)
    n_graphs = 2 if compiled == "block" else 1
    assert counter.frame_count == n_graphs
    gpt.train()
    loss_and_gradients(gpt, lambda idx, targets: forward(idx[:, 1:], targets[:, 1:]))
    assert counter.frame_count == 2 * n_graphs  # another length is another graph: nothing is dynamic


def test_compiled_blocks_serve_documents(tiny_gpt: GPT) -> None:
    documents = (torch.arange(12) >= 5).long().expand(2, 12)
    expected = loss_and_gradients(tiny_gpt.train(), partial(tiny_gpt, documents=documents))
    tiny_gpt.seed_dropout(1)
    compile_each_block(tiny_gpt, backend="aot_eager")
    ours = loss_and_gradients(tiny_gpt, partial(tiny_gpt, documents=documents))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("compiled", ["block", "model"])
def test_inductors_graphs_give_the_gradients_of_eager_training(compiled: str) -> None:
    plain = trained("none", torch.float32)
    torch.testing.assert_close(trained("full", torch.float32, compiled, backend=INDUCTOR_GRAPHS), plain)


def test_the_garbage_collector_is_off_for_a_while() -> None:
    assert gc.isenabled()
    with no_garbage_collection():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.disable()
    with no_garbage_collection():
        pass
    still_off = not gc.isenabled()
    gc.enable()
    assert still_off


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_step_leaves_no_cyclic_garbage(checkpointing: str) -> None:
    """Else the activations in it would stay until the next validation."""
    model = GPT(CONFIG).train()
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with executed(model, checkpointing=checkpointing, compile_blocks=False), no_garbage_collection():
        for _ in range(2):
            gc.collect()
            model(ids, ids).backward()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        left = [x for x in gc.garbage if isinstance(x, torch.Tensor)]
        gc.garbage.clear()
    assert left == []
