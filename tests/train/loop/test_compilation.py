"""What is compiled and captured, when, and that it changes no loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_runs import counting

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.compilation import choose_compile, choose_cuda_graphs
from fusedgpt.train.loop.trainer import train
from fusedgpt.train.report.progress import Monitor, StepMetrics

CONFIG = GPTConfig(vocab_size=61, block_size=16, n_layer=3, n_head=2, n_embd=32, dropout=0.2)


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
    assert not choose_cuda_graphs(TrainConfig(), model, 16)
    with pytest.raises(ValueError, match="--cuda-graphs on needs a CUDA device"):
        choose_cuda_graphs(TrainConfig(cuda_graphs="on"), model, 16)


@pytest.mark.usefixtures("h200")
def test_a_gpu_compiles_long_runs_and_captures_small_steps() -> None:
    gpt2 = on_gpu(GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024))
    small = on_gpu(GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=512))
    long_step = TrainConfig(batch_size=64)
    assert choose_compile(long_step, gpt2, 100, 1024) == "off"
    assert choose_compile(long_step, gpt2, 100_000, 1024) == "block"
    assert not choose_cuda_graphs(long_step, gpt2, 1024)
    assert choose_cuda_graphs(TrainConfig(batch_size=2), small, 128)
    assert not choose_cuda_graphs(TrainConfig(batch_size=2, cuda_graphs="off"), small, 128)


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
    assert 1 <= len(compiled) <= n_shapes


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
