"""Eviction order of a bounded store of chunks: least recently used first, and of one text the last chunks first.

A chunk is useless without the one before it. So when a chunk is used, the chunks before it are marked as used later.
Then no chunk is ever older than one that follows it, and the oldest of all has no successor.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence


class Recency:
    """Sizes of chunks in bytes by their names, in the order of their last use.

    `most`: the most bytes of all chunks together.
    `total`: their bytes now.
    """

    def __init__(self, most: int, sizes: Iterable[tuple[str, int]] = ()) -> None:
        self.most = most
        self._sizes = OrderedDict(sizes)
        self.total = sum(self._sizes.values())

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, name: str, size: int) -> None:
        """Adds a chunk as the last one used."""
        self.remove(name)
        self._sizes[name] = size
        self.total += size

    def remove(self, name: str) -> None:
        """Forgets a chunk, if it is there."""
        self.total -= self._sizes.pop(name, 0)

    def use(self, chain: Sequence[str]) -> list[str]:
        """Marks chunks of one text, given from its start, as used; the first becomes the last one used.

        Returns:
            The chunks that are there, in the order in which they were marked.
        """
        used = [name for name in reversed(chain) if name in self._sizes]
        for name in used:
            self._sizes.move_to_end(name)
        return used

    def make_room(self, size: int, keep: Collection[str] = ()) -> list[str] | None:
        """Forgets the oldest chunks until there is room for `size` more bytes.

        Args:
            size: bytes.
            keep: names that must stay.

        Returns:
            The forgotten names. If there would still be no room, `None`, and nothing is forgotten.
        """
        given_up, total = list[str](), self.total
        for name, held in self._sizes.items():
            if total + size <= self.most:
                break
            if name not in keep:
                given_up.append(name)
                total -= held
        if total + size > self.most:
            return None
        for name in given_up:
            self.remove(name)
        return given_up
