"""Tensor parallelism: the part of each leaf that one of several processes holds.

The axes that are cut are `vocab`, `qkv`, `heads` and `ffn_hidden`, by the names that `dbrx_fn.model.params` gives them.
Each process holds an equal part of them and all of the other axes: a part of the heads, of every expert, and of the
vocabulary. `Wqkv` stacks queries, keys and values, so each of these three sections is cut on its own. This is the cut
of Megatron-LM (https://arxiv.org/abs/1909.08053). Each layer then needs two sums over the processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from dbrx_fn.errors import ConfigError
from dbrx_fn.runtime.arguments import check_fields
from dbrx_fn.runtime.group import group


@dataclass(frozen=True)
class Shard:
    """One process's place among `size` processes that share a model. `rank` counts from 0.

    Raises:
        ConfigError: if `rank` isn't one of `size` processes.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        check_fields(self, ConfigError, prefix="shard.")
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"shard.rank is {self.rank} where it must be from 0 to {self.size - 1}.")

    @property
    def is_whole(self) -> bool:
        """Whether there is only one process, which holds everything."""
        return self.size == 1


WHOLE = Shard()
"""The only process of a model that isn't shared."""


def own_shard() -> Shard:
    """This process's place among the processes of a command."""
    return Shard(group().rank, group().size)


@dataclass(frozen=True)
class Cut:
    """How an array is cut.

    `axis`: the axis that is cut.
    `sections`: relative lengths of the sections along this axis. Each section is cut on its own.
    """

    axis: int
    sections: tuple[int, ...] = (1,)

    def slices(self, length: int, shard: Shard) -> list[tuple[slice, ...]]:
        """Indices of the shard's parts of the sections, for an array whose cut axis has this length."""
        unit, start, found = length // sum(self.sections), 0, []
        for section in self.sections:
            part = section * unit // shard.size
            first = start + shard.rank * part
            found.append((*[slice(None)] * self.axis, slice(first, first + part)))
            start += section * unit
        return found

    def whole_shape(self, shape: Sequence[int], shard: Shard) -> tuple[int, ...]:
        """The shape of an array whose part has this one."""
        return tuple(size * shard.size if axis == self.axis else size for axis, size in enumerate(shape))


def cut_of(axes: Sequence[str], heads: tuple[int, int]) -> Cut | None:
    """How a leaf with these axes is cut. `None` means that every process holds all of it.

    Args:
        axes: their names.
        heads: the numbers of query heads and of key heads.
    """
    for axis, name in enumerate(axes):
        if name == "qkv":
            return Cut(axis, (heads[0], heads[1], heads[1]))
        if name in ("vocab", "heads", "ffn_hidden"):
            return Cut(axis)
    return None


def working_sizes(*lengths: int) -> list[int]:
    """The numbers of processes that divide all lengths."""
    common = gcd(*lengths)
    return [size for size in range(1, common + 1) if common % size == 0]


def in_words(sizes: Sequence[int]) -> str:
    """Numbers of processes as a phrase: `1, 2 or 4 processes`."""
    *most, last = map(str, sizes[:8])
    return f"{', '.join(most)} or {last} processes" if most else "a single process"
