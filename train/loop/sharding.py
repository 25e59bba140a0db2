"""What an optimizer needs to know of FSDP2's sharded tensors; DTensor is imported only where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor; x itself if it is none."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor, without importing that: it takes most of a second."""
    return type(x) not in (Tensor, torch.nn.Parameter) and hasattr(x, "device_mesh")


def process_groups(p: Tensor) -> dict[str, Any]:
    """Name -> process group, for each dimension of the mesh over which p is sharded."""
    if not is_sharded(p):
        return {}
    sharded = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]  # type: ignore[attr-defined]
    groups = [p.device_mesh.get_group(i) for i in sharded]  # type: ignore[attr-defined]
    return {group.group_name: group for group in groups}


def on_whole_matrices(
    function: Callable[[Tensor], Tensor], x: Tensor, like: Any, shape: tuple[int, int]
) -> Tensor:
    """`function` of matrices (m, R, C), applied to this rank's rows x (n, r, C) of n parameters like `like`.

    Each rank gathers an equal share of the parameters, applies it to the matrices in them, which lie on top
    of each other, and sends the rows back to their ranks.
    """
    from torch.distributed.tensor import DTensor, Shard

    n, rows, C = len(x), len(like), shape[1]
    place = {"device_mesh": like.device_mesh, "shape": torch.Size((n, rows, C)), "stride": (rows * C, C, 1)}
    rows_of_all = DTensor.from_local(x, placements=[Shard(1)], run_check=False, **place)
    whole = rows_of_all.redistribute(placements=[Shard(0)]).to_local()
    done = function(whole.reshape(-1, *shape)).view_as(whole) if len(whole) else whole
    all_of_some = DTensor.from_local(done, placements=[Shard(0)], run_check=False, **place)
    mine: Tensor = all_of_some.redistribute(placements=[Shard(1)]).to_local()
    return mine
