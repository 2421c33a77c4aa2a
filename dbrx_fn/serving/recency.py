"""What a bounded store of chunks gives up when it is full: what was used the longest ago, and last chunks first.

A chunk is useless without the one before it. So whenever a chunk is used, those before it are marked as used after it.
Then no chunk is ever older than one that follows it, and the oldest of all has no successor.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence


class Recency:
    """Sizes of chunks in bytes by their names, in the order of their last use.

    `most`: bytes that all may have together.
    `total`: bytes that they have.
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
            Those that are there, in the order in which they were marked.
        """
        used = [name for name in reversed(chain) if name in self._sizes]
        for name in used:
            self._sizes.move_to_end(name)
        return used

    def make_room(self, size: int, keep: Collection[str] = ()) -> list[str] | None:
        """Forgets the oldest chunks until `size` bytes more have room.

        Args:
            size: bytes.
            keep: names that must stay.

        Returns:
            The names that were forgotten; `None`, and all stay, if there would still be no room.
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
