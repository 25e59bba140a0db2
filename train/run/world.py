"""This process among those of a run: by default it is alone. ranks.py has the case of several."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes a second to import, and `--print-config` needs none of it
    from torch import Tensor


class World:
    """A process of its own: the first and last one, for which everything here returns at once."""

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints, locks, logs and saves."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """What --device `name` means for this rank: of several each has a GPU of its own.

        Raises InputError where that cannot be.
        """
        return name

    def meet(self) -> None:
        """Wait for all ranks, however long their work takes.

        Raises RankLost where one shows no sign of life, RankLeft where one has ended.
        """

    def from_first(self, make: Callable[[], Any]) -> Any:
        """make() of the first rank, JSON where there are others, which wait for it as in meet."""
        return make()

    def check_alike(self, facts: Mapping[str, Any], device: str) -> None:
        """Raises InputError where a rank has other facts (name -> JSON) than the first, or shares its GPU.

        device: what --device says.
        """

    def agree(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all ranks, as of their call before this one; 0s at first.

        Alone: the values. The answers travel while the ranks work, so that none waits for them.
        """
        return values

    def sum(self, x: Tensor) -> Tensor:
        """x, to which that of all other ranks is added in place."""
        return x


ALONE = World()


def among_several() -> bool:
    """Whether a launcher such as torchrun started several processes like this."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1


def join() -> World:
    """This process's place among those that torchrun started; alone without it, or if it is the only one.

    Raises RankLost where not all of them appear.
    """
    if not among_several():
        return ALONE
    from fusedgpt.train.run.ranks import join_ranks

    return join_ranks()
