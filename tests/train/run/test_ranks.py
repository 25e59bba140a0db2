"""How ranks wait for each other, agree and end, in processes of their own."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch.distributed import PrefixStore, TCPStore

from fusedgpt.kernels.errors import InputError
from fusedgpt.train.run import ranks as ranks_
from fusedgpt.train.run.ranks import RankLeft, RankLost, Ranks, explain_lost
from fusedgpt.train.run.world import ALONE, World


def _refusal(world: World, facts: dict[str, Any], device: str = "cpu") -> str:
    try:
        world.check_alike(facts, device)
        world.device(device)
    except InputError as error:
        return str(error)
    return ""


def _everything(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {"first": world.from_first(lambda: {"texts": ["ä" * 3], "rank": world.rank})}
    found["alike"] = _refusal(world, {"seed": 5})
    found["unlike"] = _refusal(world, {"seed": 5 + world.rank})
    found["device"] = _refusal(world, {}, "cpu") + _refusal(world, {"seed": 5}, "cpu")
    found["agreed"] = [
        world.agree(step * 10 * world.rank, world.rank == 0 and step == 2) for step in range(4)
    ]
    found["sum"] = world.sum(torch.tensor([1.0, world.rank])).tolist()
    return found


def test_ranks_hear_the_first_agree_and_add_up() -> None:
    for rank, found in enumerate(run_ranks(2, _everything)):
        assert found["first"] == {"texts": ["äää"], "rank": 0}
        assert found["alike"] == ""
        assert found["unlike"] == "the ranks differ in seed: rank 1 has 6, rank 0 has 5"
        assert found["agreed"] == [(0, 0), (0, 0), (10, 0), (20, 1)], rank
        assert found["sum"] == [2.0, 1.0]


def test_meeting_a_slow_rank_a_silent_one_and_one_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_, "TIMEOUT", 0.5)
    monkeypatch.setattr(ranks_, "_HEARTBEAT", 0.05)
    store = PrefixStore("test", TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    first, slow = Ranks(0, 2, 0, store), Ranks(1, 2, 1, store.clone())
    threading.Timer(1.5, slow.meet).start()
    start = time.monotonic()
    first.meet()
    assert time.monotonic() - start > 1.4  # longer than a silent one is given
    alone = Ranks(0, 2, 0, PrefixStore("silent", store))
    with pytest.raises(RankLost, match="rank 1 has shown no sign of life for 0 s"):
        alone.meet()
    assert slow.say_goodbye(3, speaks=True)
    assert not slow.say_goodbye(3, speaks=True)  # only the first error is said
    with pytest.raises(RankLeft) as left:
        first.meet()
    assert left.value.exit_code == 3


def test_alone_everything_returns_at_once() -> None:
    x = torch.ones(3)
    assert ALONE.agree(15, 0) == (15, 0)
    assert ALONE.sum(x) is x
    assert ALONE.from_first(lambda: x) is x
    assert ALONE.device("cuda:7") == "cuda:7"
    ALONE.meet()


@pytest.mark.parametrize(
    ("name", "local_rank", "n_gpus", "message"),
    [
        ("cuda:1", 0, 2, "torchrun gives each process its GPU, leave it at auto or cuda"),
        ("cuda", 2, 2, "no GPU is left for this rank: give torchrun --nproc-per-node 2 or fewer"),
        ("auto", 1, 2, "need NCCL, which this build of torch lacks; gloo serves --device cpu"),
    ],
)
def test_a_gpu_that_a_rank_cannot_have(
    monkeypatch: pytest.MonkeyPatch, name: str, local_rank: int, n_gpus: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: name != "auto")
    ranks = object.__new__(Ranks)
    ranks.rank, ranks.size, ranks.local_rank = local_rank, 4, local_rank
    with pytest.raises(InputError, match=message):
        ranks.device(name)


def test_ranks_that_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = object.__new__(Ranks)
    ranks.rank, ranks.size = 0, 3
    answers = iter([[{}] * 3, ["GPU-a", "GPU-b", "GPU-a"]])
    monkeypatch.setattr(Ranks, "_gather", lambda self, value: next(answers))
    with pytest.raises(InputError, match="ranks 0 and 2 share a GPU: start one process per GPU"):
        ranks.check_alike({}, "cpu")


def test_what_an_error_says_of_other_ranks() -> None:
    gone = (
        "[/third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3. This is ..."
    )
    assert explain_lost(RuntimeError(gone)) == (
        "another rank is gone or hangs: Connection closed by peer [127.0.0.1]:3"
    )
    timeout = "Application timeout caused pair closure"  # what gloo says of a rank that hangs
    assert explain_lost(RuntimeError(timeout)) == f"another rank is gone or hangs: {timeout}"
    assert "another rank is gone" in explain_lost(torch.distributed.DistBackendError("NCCL error"))
    assert explain_lost(RuntimeError("shapes differ")) == ""
