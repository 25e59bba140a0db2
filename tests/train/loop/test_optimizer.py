"""The optimizer class: torch.optim.AdamW's behaviour, on both backends, and what it adds."""

from __future__ import annotations

import copy
import itertools
import math
import os
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from fusedgpt.kernels import reference
from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop import optimizer_plan
from fusedgpt.train.loop.optimizer import AdamW, build_optimizer
from fusedgpt.train.run.world import World

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IDS = torch.arange(24, device=DEVICE).view(2, 12)


@pytest.fixture(params=["triton", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FUSEDGPT_KERNELS", request.param)
    return str(request.param)


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def flat(value: object) -> list[Tensor]:
    """All tensors in nested containers, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in flat(item)] if isinstance(value, list | tuple) else []


def is_matrix(name: str) -> bool:
    return name.endswith(".weight") and "ln_" not in name


def test_only_matrices_decay(tiny_gpt: GPT) -> None:
    decaying, free = build_optimizer(tiny_gpt, TrainConfig(weight_decay=0.3)).param_groups
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in tiny_gpt.named_parameters()}
    assert {names[id(p)] for p in decaying["params"]} == {n for n in names.values() if is_matrix(n)}
    assert len(decaying["params"]) + len(free["params"]) == len(names)


@pytest.mark.parametrize(
    ("max_norm", "scale"), [(0.0, None), (0.01, None), (1e6, None), (0.0, 4096.0), (0.01, 4096.0)]
)
def test_a_step_is_torchs_clip_and_adamw(
    tiny_gpt: GPT, max_norm: float, scale: float | None, backend: str
) -> None:
    """scale: of the loss, which neither norm nor update show."""
    grad_scale = None if scale is None else torch.tensor(scale, device=DEVICE)
    plain = copy.deepcopy(tiny_gpt.to(DEVICE))
    config = TrainConfig(learning_rate=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(tiny_gpt, config)
    groups = [
        {
            "params": [p for p in plain.parameters() if (p.ndim >= 2) == matrices],
            "weight_decay": 0.1 * matrices,
        }
        for matrices in (True, False)
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FUSEDGPT_KERNELS", "auto")
            tiny_gpt(IDS, IDS.flip(1)).backward()
        for ours, expected in zip(tiny_gpt.parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None
            expected.grad = ours.grad.clone()
            ours.grad *= scale or 1.0
        optimizer.step(max_norm=max_norm, grad_scale=grad_scale)
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm or 1e9)
        theirs.step()
        torch.testing.assert_close(optimizer.grad_norm, expected_norm)
        assert optimizer.skipped.item() == 0
        optimizer.zero_grad()
    for ours, expected in zip(tiny_gpt.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)  # 1e-5 of a step of 1e-2


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float, backend: str) -> None:
    params = parameters((5, 7), (3,))
    optimizer = AdamW(params)
    for step in range(3):
        set_gradients(params, step)
        if step == 1:
            before = copy.deepcopy(flat([params, optimizer.state_dict()]))
            assert params[0].grad is not None
            params[0].grad[3, 3] = poison
        optimizer.step(max_norm=1.0)
        assert optimizer.skipped.item() == (step == 1)
        assert optimizer.skipped_steps.item() == (step >= 1)
        assert optimizer.grad_norm.isfinite().item() == (step != 1)
        if step == 1:
            for old, new in zip(before, flat([params, optimizer.state_dict()]), strict=True):
                assert torch.equal(old, new)
    assert optimizer.state[params[0]]["step"].item() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_make_low_precision_parameters_fp32s_rounded(dtype: torch.dtype) -> None:
    params = parameters((40, 3), (9,), dtype=dtype)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, expected = AdamW(params, lr=1e-4), AdamW(wide, lr=1e-4)
    for step in range(20):
        set_gradients(params, step)
        for p, w in zip(params, wide, strict=True):
            assert p.grad is not None
            w.grad = p.grad.float()
        optimizer.step(max_norm=1.0)
        expected.step(max_norm=1.0)
        for p, w in zip(params, wide, strict=True):
            torch.testing.assert_close(optimizer.state[p]["master"], w.detach(), rtol=1e-6, atol=1e-7)
            assert torch.equal(p, optimizer.state[p]["master"].to(dtype))
            assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_fp32_vectors_beside_bf16_matrices_take_two_launches_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As mixed-precision training keeps them: matrices with masters, 1-D parameters without, one norm."""
    monkeypatch.setenv("FUSEDGPT_KERNELS", "triton")
    matrices, vectors = parameters((40, 3), (5, 7), dtype=torch.float16), parameters((9,), (4,))
    plain = [nn.Parameter(p.detach().float()) for p in (*matrices, *vectors)]

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        parts = zip((params[:2], params[2:3], params[3:]), (0.1, 0.0, 0.2), strict=True)
        return [{"params": part, "weight_decay": decay} for part, decay in parts]

    ours, expected = AdamW(groups([*matrices, *vectors]), lr=1e-3), torch.optim.AdamW(groups(plain), lr=1e-3)
    launches = []

    def counted(name: str) -> Any:
        launch = getattr(optimizer_plan.adamw_, name)

        def run(*args: Any, **kwargs: Any) -> None:
            launches.append(name)
            launch(*args, **kwargs)

        return run

    for name in ("grad_norm", "adamw"):
        monkeypatch.setattr(optimizer_plan.adamw_, name, counted(name))
    for step in range(3):
        set_gradients([*matrices, *vectors], step)
        for p, q in zip([*matrices, *vectors], plain, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        ours.step(max_norm=1.0)
        norm = nn.utils.clip_grad_norm_(plain, 1.0)
        torch.testing.assert_close(ours.grad_norm, norm)
        expected.step()
    assert launches == ["grad_norm", "grad_norm", "adamw", "adamw"] * 3
    for p, q in zip([*matrices, *vectors], plain, strict=True):
        master = ours.state[p].get("master", p)
        torch.testing.assert_close(master, q, rtol=1e-6, atol=1e-7)
        assert torch.equal(p, master.to(p.dtype))
    assert ["master" in ours.state[p] for p in (*matrices, *vectors)] == [True, True, False, False]


def test_masters_on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [parameters((40, 3), (9,), dtype=torch.float16) for _ in range(2)]
    optimizers = [AdamW(p, lr=1e-3) for p in params]
    for path, p, optimizer in zip(("triton", "reference"), params, optimizers, strict=True):
        monkeypatch.setenv("FUSEDGPT_KERNELS", path)
        for step in range(3):
            set_gradients(p, step)
            optimizer.step(max_norm=1.0)
    for a, b in zip(*params, strict=True):
        states = [o.state[p] for o, p in zip(optimizers, (a, b), strict=True)]
        for name in ("master", "exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("direction", ["to torch", "from torch", "to itself"])
def test_state_dicts_are_torchs(direction: str, backend: str) -> None:
    """Three steps in one, three more in the other, are six steps in torch's."""
    first, second, plain = (parameters((6, 5), (4,)) for _ in range(3))
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1}
    theirs = {"from torch": 0, "to torch": 1}.get(direction)
    classes = [torch.optim.AdamW if i == theirs else AdamW for i in range(2)]
    a = classes[0](first, **settings)
    expected = torch.optim.AdamW(plain, **settings)
    for step in range(3):
        set_gradients(first, step)
        a.step()
    b = classes[1](second, lr=1.0)  # settings come along with the state
    for p, q in zip(first, second, strict=True):
        q.data.copy_(p.data)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for step in range(3, 6):
        set_gradients(second, step)
        b.step()
    for step in range(6):
        set_gradients(plain, step)
        expected.step()
    for p, q in zip(second, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)
        assert b.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert float(b.state[p]["step"]) == 6


def test_loading_keeps_fp32_moments_of_low_precision_parameters() -> None:
    params, others = (parameters((50,), dtype=torch.bfloat16) for _ in range(2))
    a, b = AdamW(params), AdamW(others)
    set_gradients(params, 0)
    a.step()
    b.load_state_dict(a.state_dict())
    set_gradients(params, 1)
    set_gradients(others, 1)
    a.step()
    b.step()
    for name, x in a.state[params[0]].items():
        assert torch.equal(x, b.state[others[0]][name])
        assert x.data_ptr() != b.state[others[0]][name].data_ptr()
    assert torch.equal(*params, *others)


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_torchs_other_algorithms_are_refused(option: str) -> None:
    saved = torch.optim.AdamW(parameters((2,)), **{option: True}).state_dict()
    with pytest.raises(ValueError, match=f"{option}: expected False"):
        AdamW(parameters((2,))).load_state_dict(saved)


def test_groups_have_their_own_settings_and_may_come_later(backend: str) -> None:
    params, plain = (parameters((8,), (7,), (6,)) for _ in range(2))
    late = {"lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.5}
    pairs = ((AdamW, params), (torch.optim.AdamW, plain))
    optimizers = [kind([{"params": p[:1]}, {"params": []}], lr=1e-3) for kind, p in pairs]
    for step in range(4):
        if step == 2:
            for optimizer, (_, p) in zip(optimizers, pairs, strict=True):
                optimizer.add_param_group({"params": p[1:], **late})
        if step == 3:
            for optimizer in optimizers:
                optimizer.param_groups[2]["lr"] = 0.01  # as a scheduler does
        for optimizer, (_, p) in zip(optimizers, pairs, strict=True):
            set_gradients(p, step)
            optimizer.step()
    for p, expected in zip(params, plain, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-7)


def test_parameters_without_gradients_stay_and_do_not_age(backend: str) -> None:
    params = parameters((8,), (7,), (0,))
    optimizer = AdamW(params)
    optimizer.step()  # no gradients at all
    assert not optimizer.state
    before = params[1].detach().clone()
    for step, present in enumerate([(0,), (0, 1, 2), (1,)]):
        set_gradients(params, step)
        for i in {0, 1, 2} - set(present):
            params[i].grad = None
        optimizer.step()
        if step == 0:
            assert torch.equal(params[1], before)
            assert params[1] not in optimizer.state
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 2, 1]
    assert not torch.equal(params[1], before)


def test_gradients_may_lie_anywhere_and_in_any_order(backend: str) -> None:
    """Moved by zero_grad, or transposed; parameters moved."""
    params, plain = (parameters((6, 4), (5, 3)) for _ in range(2))
    optimizer, expected = AdamW(params, lr=0.1), torch.optim.AdamW(plain, lr=0.1, fused=False)
    kept = []
    for step in range(4):
        set_gradients(params, step)
        if step == 2:
            params[0].data = params[0].data.clone()
        for p, q in zip(params, plain, strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
            if step % 2:
                p.grad = p.grad.t().contiguous().t()
            kept.append(p.grad)  # so that the next one lies elsewhere
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in params)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_micro_batches_add_up_in_fp32() -> None:
    """Ten gradients of 2^-9 on one of 1, where bf16 has steps of 2^-7 upwards, are lost in bf16."""
    (p,), (q,) = parameters((16,), dtype=torch.bfloat16), parameters((16,), dtype=torch.bfloat16)
    optimizer, plain = AdamW([p], fp32_accumulation=True), AdamW([q])
    for _ in range(2):
        for x in (p, q):
            for factor in (1.0, *[2.0**-9] * 10):
                (x * factor).sum().backward()
        assert p.grad is None
        optimizer.step()
        plain.step()
        assert optimizer.grad_norm.item() == pytest.approx(4.0 * (1.0 + 10 * 2.0**-9), rel=1e-6)
        assert plain.grad_norm.item() == 4.0
        optimizer.zero_grad()
        plain.zero_grad()
    optimizer.step()  # nothing to do
    assert optimizer.state[p]["step"].item() == 2


def test_the_norm_of_millions_of_gradients_is_not_rounded_away() -> None:
    """On a CPU torch's own is 8e-5 off here, and 6e-4 for four times as many."""
    (p,) = parameters((1 << 22,))
    p.grad = p.detach().clone()
    optimizer = AdamW([p])
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(p.grad.double().norm().item(), rel=1e-5)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_the_sums(set_to_none: bool) -> None:
    (p,) = parameters((4,), dtype=torch.float16)
    optimizer = AdamW([p], fp32_accumulation=True)
    for _ in range(2):
        p.sum().backward()
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(2.0)
        optimizer.zero_grad(set_to_none)


def test_fp32_gradients_add_up_where_they_are(tiny_gpt: GPT) -> None:
    tiny_gpt.to(DEVICE)
    tiny_gpt(IDS, IDS.flip(1), dtype=torch.bfloat16).backward()
    p = tiny_gpt.wpe.weight
    assert p.grad is not None
    first, address = p.grad.clone(), p.grad.data_ptr()
    tiny_gpt(IDS, IDS.flip(1), dtype=torch.bfloat16).backward()
    assert p.grad.dtype == torch.float32
    assert p.grad.data_ptr() == address
    torch.testing.assert_close(p.grad, 2 * first, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: expected a number >= 0, got -1"),
        ({"eps": math.nan}, "eps: expected a number >= 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay: expected"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers, 0 <= beta < 1, got \(0.9, 1.0\)"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(parameters((2,)), **options)


def test_what_cannot_be_stepped_is_refused(backend: str) -> None:
    embedding = nn.Embedding(5, 3, sparse=True, device=DEVICE)
    optimizer = AdamW(embedding.parameters())
    embedding.weight.grad = torch.ones_like(embedding.weight)
    optimizer.step()
    embedding.weight.grad = None
    embedding(IDS[0, :1]).sum().backward()
    with pytest.raises(
        ValueError, match=r"gradient of parameter 0, \(5, 3\): expected a dense tensor, got torch"
    ):
        optimizer.step()
    gaps = nn.Parameter(torch.ones(4, 6, device=DEVICE)[:, :3])
    gaps.grad = torch.ones(4, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"contiguous memory, got strides \(6, 1\)"):
        AdamW([gaps]).step()
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdamW([{"params": [gaps]}, {"params": [gaps]}])


def test_a_tensor_learning_rate_is_read_by_the_step(backend: str) -> None:
    (p,), (q,) = parameters((8,)), parameters((8,))
    lr = torch.tensor(0.5, device=DEVICE)
    ours, expected = AdamW([p], lr=lr), torch.optim.AdamW([q], lr=0.5)
    for step in range(3):
        lr.fill_(0.5 / (step + 1))
        expected.param_groups[0]["lr"] = 0.5 / (step + 1)
        set_gradients([p, q], step)
        q.grad = None if p.grad is None else p.grad.clone()
        ours.step()
        expected.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_capture_uses_tables_made_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it shows without a GPU: what is captured runs once, and nothing new is made during it."""
    monkeypatch.setenv("FUSEDGPT_KERNELS", "triton")
    params, plain = (parameters((8,), (3000,)) for _ in range(2))
    optimizer, expected = AdamW(params), AdamW(plain)
    for step in range(6):
        set_gradients(params, step)
        set_gradients(plain, step)
        monkeypatch.setattr(optimizer_plan, "capturing", lambda step=step: step in (2, 4))
        optimizer.step()
        monkeypatch.setattr(optimizer_plan, "capturing", lambda: False)
        expected.step()
        for p, q in zip(params, plain, strict=True):
            assert torch.equal(p, q)
    plan = optimizer._plan
    assert plan is not None
    assert plan.captured
    monkeypatch.setattr(optimizer_plan, "capturing", lambda: True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="expected one step for every capture"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match="expected the last change of a hyper-parameter"):
        optimizer.step()
    params[0].grad = None
    with pytest.raises(RuntimeError, match="a step with the same parameters and dtypes before the capture"):
        optimizer.step()
    monkeypatch.setattr(optimizer_plan, "capturing", lambda: False)
    optimizer.step()
    assert optimizer._captured == [plan]  # graphs still read it


@pytest.mark.gpu
def test_a_graph_replays_steps_with_a_new_learning_rate() -> None:
    params, plain = (parameters((300, 40), (3000,), dtype=torch.bfloat16) for _ in range(2))
    lr = torch.tensor(0.1, device=DEVICE)
    x = torch.randn(300, 40, device=DEVICE, dtype=torch.bfloat16)
    optimizer, expected = AdamW(params, lr=lr), AdamW(plain, lr=lr.item())

    def train(p: list[nn.Parameter], optimizer: AdamW) -> None:
        ((p[0] * x).sum() + p[1].square().sum()).backward()
        optimizer.step(max_norm=1.0)
        optimizer.zero_grad()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        train(params, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(params, optimizer)
    train(plain, expected)
    for new_lr in (0.1, 0.01, 0.3):
        lr.fill_(new_lr)
        x.normal_()
        graph.replay()
        expected.param_groups[0]["lr"] = lr.item()  # rounded to fp32
        train(plain, expected)
        for p, q in zip(params, plain, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(optimizer.state[p]["step"], expected.state[q]["step"])
    train(params, optimizer)  # and without the graph, whose tables are its own
    train(plain, expected)
    graph.replay()
    train(plain, expected)
    assert all(map(torch.equal, params, plain))


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu() -> None:
    params = parameters((300, 40), (3000,), dtype=torch.bfloat16)
    optimizer = AdamW(params)
    set_gradients(params, 0)
    optimizer.step(max_norm=1.0)
    gradients = [[torch.randn_like(p) for p in params] for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i, grads in enumerate(gradients):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            optimizer.param_groups[0]["lr"] = 1e-3 * i
            optimizer.step(max_norm=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.state[params[0]]["step"].item() == 4


def _sharded_run(world: World) -> None:
    """One of two processes."""
    for path in ("triton", "reference") if DEVICE.type == "cpu" else ("reference",):
        os.environ["FUSEDGPT_KERNELS"] = path
        _compare_sharded_with_whole(world.rank)


def _compare_sharded_with_whole(rank: int) -> None:
    """FSDP2 and our AdamW against the whole model in plain torch."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))  # 7 and 3 rows: uneven shards
    model = copy.deepcopy(plain)
    fully_shard(model, mesh=mesh)
    optimizer, expected = AdamW(model.parameters(), lr=0.1), torch.optim.AdamW(plain.parameters(), lr=0.1)
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for m in (model, plain):
            m.zero_grad()
            (m(x).square().sum() * 100.0).backward()
        if step == 1:
            first = next(model.parameters()).grad.to_local()
            first[0, 0] = math.nan if rank == 1 else first[0, 0]  # on one rank only
            optimizer.step(max_norm=1.0)
            assert optimizer.skipped.item() == 1
            continue
        optimizer.step(max_norm=1.0)
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        expected.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["exp_avg"].placements == p.placements


def test_sharded_parameters_share_one_norm() -> None:
    run_ranks(2, _sharded_run)


# Muon


@pytest.fixture
def one_block(tiny_config: GPTConfig) -> GPT:
    return GPT(tiny_config.model_copy(update={"n_layer": 1}), seed=1).to(DEVICE).eval()


def muon_config(**settings: Any) -> TrainConfig:
    return TrainConfig(optimizer="muon", learning_rate=1e-2, muon_learning_rate=3e-2, **settings)


def test_muon_takes_the_matrices_of_the_blocks(one_block: GPT) -> None:
    optimizer = build_optimizer(one_block, muon_config(weight_decay=0.3))
    names = {p: name for name, p in one_block.named_parameters()}
    of_groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    assert sorted(itertools.chain(*of_groups)) == sorted(names.values())
    assert of_groups[0] == ["wte.weight", "wpe.weight"]
    assert all("bias" in name or "ln_" in name for name in of_groups[1])
    assert {name.split(".", 2)[2] for name in of_groups[2]} == {
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }
    assert {name.split(".", 2)[2] for name in of_groups[3]} == {"attn.c_attn.weight"}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0, 0.3, 0.3]
    assert [group.get("lr_factor") for group in optimizer.param_groups] == [None, None, 3.0, 3.0]


@pytest.mark.parametrize(("n_head", "max_norm", "scale"), [(2, 0.0, None), (1, 0.01, 4096.0)])
def test_a_step_is_adamws_and_muons(
    tiny_config: GPTConfig, n_head: int, max_norm: float, scale: float | None, backend: str
) -> None:
    """Each head's queries, keys and values are orthogonalised apart; all gradients share one norm."""
    one_block = GPT(tiny_config.model_copy(update={"n_layer": 1, "n_head": n_head}), seed=1).to(DEVICE).eval()
    grad_scale = None if scale is None else torch.tensor(scale, device=DEVICE)
    plain = copy.deepcopy(one_block)
    optimizer = build_optimizer(one_block, muon_config(weight_decay=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * group.get("lr_factor", 1.0)
    by_muon = {n for n, p in plain.named_parameters() if is_matrix(n) and n.startswith("h.")}
    rest = [(n, p) for n, p in plain.named_parameters() if n not in by_muon]
    theirs = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 * is_matrix(n)} for n, p in rest], lr=1e-2, fused=True
    )
    momenta = {n: torch.zeros_like(p) for n, p in plain.named_parameters()}
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FUSEDGPT_KERNELS", "auto")
            one_block(IDS, IDS.flip(1)).backward()
        for ours, expected in zip(one_block.parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None
            expected.grad = ours.grad.clone()
            ours.grad *= scale or 1.0
        optimizer.step(max_norm=max_norm, grad_scale=grad_scale)
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm or 1e9)
        torch.testing.assert_close(optimizer.grad_norm, expected_norm)
        theirs.step()
        with torch.no_grad():
            for name, p in plain.named_parameters():
                if name in by_muon:
                    parts = 3 * n_head if "c_attn" in name else 1
                    state = (x.view(parts, -1, p.shape[1]) for x in (p, p.grad, momenta[name]))
                    new, momentum = reference.muon(*state, lr=3e-2, beta=0.95, weight_decay=0.1)
                    p.copy_(new.view_as(p))
                    momenta[name] = momentum.view_as(p)
        optimizer.zero_grad()
    for (name, ours), expected in zip(one_block.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5, msg=name)
        assert set(optimizer.state[ours]) == (
            {"momentum_buffer"} if name in by_muon else {"step", "exp_avg", "exp_avg_sq"}
        )


def test_muon_skips_what_is_not_finite(one_block: GPT, backend: str) -> None:
    optimizer = build_optimizer(one_block, muon_config())
    for step in range(2):
        set_gradients(list(one_block.parameters()), step)
        if step == 1:
            before = copy.deepcopy(flat([list(one_block.parameters()), optimizer.state_dict()]))
            one_block.h[0].mlp.c_fc.weight.grad[0, 0] = math.nan
        optimizer.step(max_norm=1.0)
        if step == 1:
            after = flat([list(one_block.parameters()), optimizer.state_dict()])
            assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("skipped", [0.0, 1.0])
def test_torchs_ops_skip_a_step_without_the_host(
    one_block: GPT, skipped: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU `skipped` is not read, as it is on a CPU."""
    monkeypatch.setenv("FUSEDGPT_KERNELS", "reference")
    optimizer = build_optimizer(one_block, muon_config())
    set_gradients(list(one_block.parameters()), 0)
    optimizer.step()
    plan = optimizer._plan
    assert isinstance(plan, optimizer_plan.TorchPlan)
    bucket = next(bucket for bucket in plan.buckets if bucket.shape == (24, 24))
    before = [x.clone() for x in (*bucket.masters, *bucket.exp_avgs)]
    plan._muon(bucket, [torch.ones_like(p) for p in bucket.params], None, torch.tensor(skipped))
    same = [
        torch.equal(old, new) for old, new in zip(before, (*bucket.masters, *bucket.exp_avgs), strict=True)
    ]
    assert set(same) == {skipped == 1.0}


def test_muon_refuses_what_is_no_matrix() -> None:
    for shape, matrices in (((4,), 1), ((4, 3), 3), ((2, 2, 2), 1)):
        groups = [{"params": parameters(shape), "momentum": 0.9, "matrices": matrices}]
        with pytest.raises(ValueError, match=f"Muon: expected {matrices} matrices of one shape"):
            AdamW(groups)
    with pytest.raises(ValueError, match="momentum: expected"):
        AdamW([{"params": parameters((4, 4)), "momentum": 1.0}])
