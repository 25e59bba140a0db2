"""DDP and FSDP2 over gloo: the same losses, gradients and checkpoints as one process has."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from training_runs import config, counting, outcome, train_tiny

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.batches import Cursor, StepBatch
from fusedgpt.train.loop.distributed import DataParallel, FullyShardedDataParallel, OneProcess, whole
from fusedgpt.train.loop.execution import compile_each_block, executed
from fusedgpt.train.loop.optimizer import AdamW, build_optimizer
from fusedgpt.train.loop.precision import LossScale
from fusedgpt.train.loop.step import Step
from fusedgpt.train.loop.trainer import train
from fusedgpt.train.loop.validation import evaluate
from fusedgpt.train.run.checkpoint import load_checkpoint
from fusedgpt.train.run.world import ALONE, World

KINDS = {"ddp": DataParallel, "fsdp": FullyShardedDataParallel}
GPT_CONFIG = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.1)
# Four ranks' sums of at most eight fp32 terms in another order: 8 * 2^-24, times some ten through a model.
GRADIENT_TOLERANCE = {"rtol": 2e-5, "atol": 1e-7}
# AdamW amplifies them where a gradient is nearly 0, so weights go apart, and losses with them, step by step.
LOSS_TOLERANCE = 1e-5  # relative, within 30 steps
STATE_TOLERANCE = 1e-5  # of a tensor's largest value, after 20 steps


# --- runs: one process for a while, then others ---

STOPS = (6, 13, 20, 26)  # a run of 26 steps in four parts
PARTS = [{}, {"parallel": "ddp"}, {"parallel": "fsdp"}, {}]
Windows = list[list[list[int]]]  # token ids, by step


class _Enough(Exception):
    """The part is done."""


def train_until(world: World, run_dir: str, stop: int, resumes: bool, changes: dict[str, Any]) -> Windows:
    """Train up to a step and no further, after a save of it; what this rank trained on."""
    from fusedgpt.train.run.directory import Run
    from fusedgpt.train.run.follower import Follower

    for kind in (Run, Follower):
        saved = kind.save

        def save(run: Any, checkpoint: Any, saved: Any = saved) -> None:
            saved(run, checkpoint)
            if checkpoint.step == stop and stop != STOPS[-1]:
                raise _Enough

        kind.save = save  # type: ignore[method-assign]
    windows: Windows = []
    run_step = Step.run

    def noting(step: Step, batch: StepBatch) -> Tensor:
        windows.append([row for inputs, _ in batch.micro_batches for row in inputs.tolist()])
        return run_step(step, batch)

    Step.run = noting  # type: ignore[method-assign]
    with suppress(_Enough):
        path, options = Path(run_dir), {**changes, "steps": STOPS[-1], "save_every": str(stop)}
        train_tiny(path, resume=path if resumes else None, world=world, **options)
    return windows


def in_parts(run_dir: Path, sizes: Sequence[int]) -> tuple[Any, Windows]:
    """(the run's outcome, what all ranks trained on) of a run whose parts have other numbers of ranks."""
    windows: Windows = []
    for i, (size, changes) in enumerate(zip(sizes, PARTS, strict=True)):
        of_ranks = run_ranks(size, train_until, str(run_dir), STOPS[i], i > 0, changes)
        windows += [list(chain.from_iterable(step)) for step in zip(*of_ranks, strict=True)]
    return outcome(run_dir), windows


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of 26 steps in one process, as in_parts."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    (windows,) = run_ranks(1, train_until, str(run_dir), STOPS[-1], False, {})
    return outcome(run_dir), windows


@pytest.mark.parametrize("sizes", [(1, 2, 4, 1), pytest.param((1, 4, 2, 1), marks=pytest.mark.soak)], ids=str)
def test_a_run_goes_on_with_any_number_of_ranks(alone: Any, sizes: Sequence[int], tmp_path: Path) -> None:
    """Row 6 of docs/dev/fault_tests.md: dropout, uneven micro-batches and validations, DDP, then FSDP2."""
    (losses, tensors, state), windows = in_parts(tmp_path / "run", sizes)
    (expected, expected_tensors, expected_state), expected_windows = alone
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 27))
    assert [row["step"] for row in rows if "val_loss" in row] == [7, 14, 21, 26]
    assert windows == expected_windows  # no gap and no repeat
    for step, (loss, norm, lr) in expected.items():
        assert losses[step] == pytest.approx((loss, norm, lr), rel=LOSS_TOLERANCE * 10), step
        assert losses[step][0] == pytest.approx(loss, rel=LOSS_TOLERANCE), step
    assert tensors.keys() == expected_tensors.keys()
    assert state["dropout"] == expected_state["dropout"]
    assert state["progress"]["cursor"] == expected_state["progress"]["cursor"]
    assert state["progress"]["tokens"] == expected_state["progress"]["tokens"]


def restored(world: World, run_dir: str, parallel: str) -> dict[str, Tensor]:
    """Load a finished run's checkpoint and save it again: the tensors; and the weights train() leaves."""
    from fusedgpt.train.loop import trainer
    from fusedgpt.train.loop.distributed import choose_parallel, named_parameters, share_checkpoint

    settings = config(parallel=parallel)
    checkpoint = load_checkpoint(max(Path(run_dir).glob("checkpoints/step-*"))) if world.first else None
    model = GPT(settings.model.gpt_config(61), seed=1)
    kind = choose_parallel(settings.train, model, 16, world)
    training = trainer._prepare(model, counting(), settings.train, None, kind, world)
    shared = share_checkpoint(checkpoint, world, named_parameters(training.model))
    assert shared is not None
    training.restore(shared)
    again = training.snapshot()
    training.finish(model)
    tensors = {f"{stem}/{name}": x for stem, named in again.tensors.items() for name, x in named.items()}
    return {**tensors, **{f"left/{name}": p.detach() for name, p in model.named_parameters()}}


def test_a_checkpoint_is_the_same_bytes_however_many_ranks_hold_it(tmp_path: Path) -> None:
    train_tiny(tmp_path / "run", steps=9)
    (alone,) = run_ranks(1, restored, str(tmp_path / "run"), "auto")
    assert any(name.startswith("optimizer/") for name in alone)
    for parallel in KINDS:
        first, second = run_ranks(2, restored, str(tmp_path / "run"), parallel)
        assert first.keys() == alone.keys()
        assert all(torch.equal(first[name], alone[name]) for name in alone), parallel
        assert all(name.startswith("left/") for name in second)


# --- one step ---


def step_of(world: World, kind: str, dtype: torch.dtype, **options: Any) -> tuple[Step, GPT, AdamW]:
    settings = TrainConfig(batch_size=2, batch_tokens=8 * 16, grad_clip=0.0, **options)
    parallel = KINDS[kind](world, settings, 16) if world.size > 1 else OneProcess()
    model = parallel.place(GPT(GPT_CONFIG, seed=1), torch.device("cpu"), torch.float32).train()
    if dtype != torch.float32:  # as on a GPU
        for p in model.parameters():
            p.data = p.data.to(dtype) if p.ndim == 2 else p.data
    optimizer = build_optimizer(model, settings, micro_batches=2)
    parallel.begin(model)
    forward = partial(parallel.connect(model, optimizer), dtype=dtype)
    step = Step(forward, optimizer, settings, parallel=parallel)
    return step, model, optimizer


def batch_of(world: World, i: int = 0, *, size: int = 2) -> StepBatch:
    """This rank's part of eight windows with fewer and fewer targets, `size` a micro-batch."""
    ids = torch.randint(60, (8, 17), generator=torch.Generator().manual_seed(i))
    targets = ids[:, 1:].clone()
    for row in range(8):
        targets[row, 16 - row :] = -100
    mine = 8 // world.size
    rows = [slice(r, r + size) for r in range(world.rank * mine, (world.rank + 1) * mine, size)]
    counts = [int((targets[r] != -100).sum()) for r in rows]
    total = int((targets != -100).sum())
    return StepBatch(
        micro_batches=tuple((ids[r, :-1].contiguous(), targets[r].contiguous()) for r in rows),
        shares=torch.tensor([count / total for count in counts]),
        tokens=total,
        following=Cursor(),
    )


def gradients(world: World, kind: str, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """The whole step's gradients as the optimizer sees them, after a step that changes nothing."""
    step, model, optimizer = step_of(world, kind, dtype, **options)
    seen: list[Tensor] = []

    def keep(*_: Any, **__: Any) -> None:
        for p in model.parameters():
            grad = optimizer.sums.get(p, p.grad)
            assert grad is not None
            seen.append(grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone())
        optimizer.zero_grad()

    optimizer.step = keep  # type: ignore[method-assign]
    loss = world.sum(step(batch_of(world), 0.0)[:1].clone())
    names = [name for name, _ in model.named_parameters()]
    return {**dict(zip(names, seen, strict=True)), "loss": loss}


CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("ddp", torch.float32, {}),
    ("ddp", torch.bfloat16, {}),
    ("ddp", torch.bfloat16, {"reduce_dtype": "bf16"}),
    ("fsdp", torch.float32, {}),
    ("fsdp", torch.float32, {"reduce_dtype": "bf16"}),
]


RECOMPUTED = [("selective", torch.float32), ("full", torch.bfloat16)]


def compute_in(dtype: torch.dtype, step: Step) -> None:
    """Activations in a dtype other than the weights'."""
    forward = step.forward
    step.forward = lambda *args, **options: forward(*args, **{**options, "dtype": dtype})


def recomputed(world: World, checkpointing: str, dtype: torch.dtype) -> list[tuple[float, float]]:
    """(loss, gradient norm) of steps whose activations are recomputed, in `dtype`."""
    step, model, _ = step_of(world, "fsdp", torch.float32)
    compute_in(dtype, step)
    with executed(model, checkpointing=checkpointing, compile_blocks=False):
        results = [step(batch_of(world, i), 1e-2) for i in range(3)]
    return [(world.sum(r[:1].clone()).item(), r[1].item()) for r in results]


def trained_by_muon(world: World, kind: str) -> list[Tensor]:
    """All parameters after three steps."""
    step, model, _ = step_of(world, kind, torch.float32, optimizer="muon")
    for i in range(3):
        step(batch_of(world, i), 1e-3)
    return [whole(p.detach()) for p in model.parameters()]


def after_20_steps(world: World, kind: str, size: int, grad_clip: float) -> dict[str, Tensor]:
    """Parameters and moments; size: windows of a micro-batch."""
    step, model, optimizer = step_of(world, kind, torch.float32)
    step.grad_clip = grad_clip
    for i in range(20):
        step(batch_of(world, i, size=size), 1e-2)
    found = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name}.{kind}": whole(x).clone() for kind, x in optimizer.state[p].items()}
    return found


def infinite_on_rank_1(world: World) -> StepBatch:
    """A batch whose loss is not finite on one rank."""
    batch = batch_of(world)
    if world.rank == 1:
        batch.micro_batches[0][1][:] = -100
        batch.shares[0] = math.inf
    return batch


def loss_scaled(world: World, kind: str) -> Any:
    """(losses, fp16's loss scale) of a good step, one that is skipped on two ranks, and a good one."""
    step, model, _ = step_of(world, kind, torch.float32)
    compute_in(torch.float16, step)
    step.loss_scale = LossScale(torch.device("cpu"))
    step.loss_scale.good_steps.fill_(1999.0)  # the next one doubles it
    results = [step(batch_of(world), 1e-2)]
    if world.size > 1:
        step(infinite_on_rank_1(world), 1e-2)
    else:
        model.dropout_windows += 8
    results.append(step(batch_of(world, 1), 1e-2))
    return [world.sum(r[:1].clone()).item() for r in results], step.loss_scale.state()


def stopped_early(world: World) -> tuple[int, int | None]:
    """(steps, the best validation's) of a run that loses patience."""
    settings = config(batch_size=1, batch_tokens=2 * 16, eval_every=2, patience=2)
    summary = train(GPT(settings.model.gpt_config(61), seed=5), counting(), settings.train, world=world)
    return summary.steps, summary.best_step


def on_two(world: World) -> dict[str, Any]:
    """All that one step does on two ranks, in one launch."""
    found: dict[str, Any] = {
        "gradients": [gradients(world, kind, dtype, **options) for kind, dtype, options in CASES]
    }
    found["recomputed"] = {how: recomputed(world, *how) for how in RECOMPUTED}
    found["stopped"] = stopped_early(world)
    for kind in KINDS:
        found[f"{kind} muon"] = trained_by_muon(world, kind)
        found[f"{kind} states"] = [after_20_steps(world, kind, *how) for how in ((4, 0.0), (2, 0.1))]
        found[f"{kind} loss scale"] = loss_scaled(world, kind)
        step, model, _ = step_of(world, kind, torch.float32)
        compile_each_block(model, backend="eager")
        before = [p.detach().clone() for p in model.parameters()]
        result = step(infinite_on_rank_1(world), 1e-2)
        alike = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        found[f"{kind} skipped"] = (result[2].item(), alike)
        results = [step(batch_of(world, i), 1e-2) for i in range(3)]
        found[f"{kind} compiled"] = [(world.sum(r[:1].clone()).item(), r[1].item()) for r in results]
        batches = [batch_of(ALONE, i).micro_batches[0] for i in range(5)]
        evaluation = evaluate(model, batches, world=world)
        assert evaluation is not None
        found[f"{kind} evaluation"] = evaluation.loss
    return found


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(2, on_two)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_gradients_are_those_of_one_process(two: list[dict[str, Any]], case: int) -> None:
    """The mean over all targets, though each micro-batch and each rank has another number of them."""
    kind, dtype, options = CASES[case]
    expected = gradients(ALONE, kind, dtype)
    # Rounded to bf16 twice at most, 2^-9 each, of a tensor's largest sums.
    low = options.get("reduce_dtype") == "bf16"
    for found in two:
        for name, x in found["gradients"][case].items():
            tolerance = GRADIENT_TOLERANCE
            if low:
                tolerance = {"rtol": 2**-8, "atol": 2**-8 * expected[name].abs().max().item()}
            assert x.dtype == (
                torch.bfloat16 if low and dtype != torch.float32 and x.ndim == 2 else torch.float32
            )
            torch.testing.assert_close(x.float(), expected[name], **tolerance, msg=name)


@pytest.mark.parametrize("how", RECOMPUTED, ids=str)
def test_sharded_blocks_that_are_recomputed(two: list[dict[str, Any]], how: tuple[str, torch.dtype]) -> None:
    for found in two:
        for ours, theirs in zip(found["recomputed"][how], recomputed(ALONE, *how), strict=True):
            assert ours == pytest.approx(theirs, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_muon_trains_as_on_one(two: list[dict[str, Any]], kind: str) -> None:
    """FSDP's ranks have parts of matrices, which are orthogonalised whole."""
    for found in two:
        for ours, expected in zip(found[f"{kind} muon"], trained_by_muon(ALONE, kind), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_both_kinds_have_the_same_state_after_20_steps(two: list[dict[str, Any]]) -> None:
    """Sums of two terms have no order: with a micro-batch a rank every bit is the same."""
    for found in two:
        (ddp, ddp_in_two), (fsdp, fsdp_in_two) = (found[f"{kind} states"] for kind in KINDS)
        assert all(torch.equal(fsdp[name], x) for name, x in ddp.items())
        assert _distance(fsdp_in_two, ddp_in_two) < STATE_TOLERANCE  # clipped, by norms of shards


def _distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference, in units of its tensor's largest value."""
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, x in theirs.items():
        error = (ours[name] - x).abs()
        if name.endswith("c_attn.bias"):  # softmax does not see a key's bias: its gradient is all rounding,
            error[16:32] = 0.0  # which AdamW makes steps of
        worst = max(worst, (error.max() / x.abs().max()).item())
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_agree_on_the_loss_scale(two: list[dict[str, Any]], kind: str) -> None:
    losses, _ = loss_scaled(ALONE, kind)
    for found in two:
        ours, scale = found[f"{kind} loss scale"]
        assert scale == {"scale": 65536.0, "good_steps": 1.0}  # doubled, halved, one good step
        assert ours == pytest.approx(losses, rel=2**-10)  # fp16's rounding


def test_ranks_agree_when_to_stop(two: list[dict[str, Any]]) -> None:
    stopped = stopped_early(ALONE)
    assert stopped[0] < 80
    assert [found["stopped"] for found in two] == [stopped] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_a_skipped_step_and_an_evaluation(two: list[dict[str, Any]], kind: str) -> None:
    step, model, _ = step_of(ALONE, kind, torch.float32)
    model.dropout_windows += 8  # those of the step that was skipped
    expected = [step(batch_of(ALONE, i), 1e-2)[:2].tolist() for i in range(3)]
    evaluation = evaluate(model, [batch_of(ALONE, i).micro_batches[0] for i in range(5)])
    assert evaluation is not None
    for found in two:
        assert found[f"{kind} skipped"] == (1.0, True)
        for ours, theirs in zip(found[f"{kind} compiled"], expected, strict=True):
            assert ours == pytest.approx(theirs, rel=LOSS_TOLERANCE)
        assert found[f"{kind} evaluation"] == pytest.approx(evaluation.loss, rel=LOSS_TOLERANCE)
    assert two[0][f"{kind} evaluation"] == two[1][f"{kind} evaluation"]
