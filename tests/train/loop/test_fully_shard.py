"""FSDP2 over two gloo processes: each block and the root sharded, losses and weights as unsharded."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_two

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.batches import Cursor, StepBatch
from fusedgpt.train.loop.execution import executed
from fusedgpt.train.loop.optimizer import build_optimizer
from fusedgpt.train.loop.step import Step

CONFIG = GPTConfig(vocab_size=61, block_size=16, n_layer=3, n_head=2, n_embd=16, dropout=0.1)
TRAIN = TrainConfig(grad_clip=0.5, weight_decay=0.1)


def _train_both(_rank: int, checkpointing: str, dtype: torch.dtype) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    plain = GPT(CONFIG, seed=1).train()
    sharded = copy.deepcopy(plain)
    with executed(sharded, checkpointing=checkpointing, compile_blocks=False):
        for block in sharded.blocks():
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        steps = [
            Step(partial(model, dtype=dtype), build_optimizer(model, TRAIN), TRAIN)
            for model in (plain, sharded)
        ]
        for i in range(4):
            ids = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(i))
            batch = StepBatch.collect([(ids[:, :-1], ids[:, 1:])], Cursor())  # the same on both ranks
            expected, ours = (step(batch, 1e-2) for step in steps)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        assert len(p.to_local()) < len(q), name
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("checkpointing", "dtype"),
    [("none", torch.float32), ("selective", torch.float32), ("full", torch.bfloat16)],
)
def test_a_sharded_model_trains_as_a_whole_one(
    checkpointing: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    run_two(_train_both, tmp_path, checkpointing, dtype)
