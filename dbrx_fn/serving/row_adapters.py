"""The adapters that an engine serves over one set of weights, by the names that requests give."""

from collections.abc import Sequence
from functools import lru_cache

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import shown
from dbrx_fn.model.stacked_adapters import choose_adapters, stacked_count
from dbrx_fn.model.tree import Params
from dbrx_fn.serving.request import Request

_KEPT = 16
"""Trees that are kept for the mixes of the latest batches. They share all but a few small arrays."""


class RowAdapters:
    """Gives each batch the tree that its requests' adapters make."""

    def __init__(self, params: Params, names: Sequence[str]) -> None:
        """Takes the names of a tree's stacked adapters.

        Args:
            params: the tree, perhaps with a stack (`stack_adapters`).
            names: one for each adapter of the stack, in its order.

        Raises:
            InputError: if a name is no text or is there twice, or their number differs from the stack's.
        """
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise InputError(f"adapters is {shown(names)} where a list of names is expected.")
        twice = [name for place, name in enumerate(names) if name in names[:place]]
        if twice:
            raise InputError(f"adapters has {shown(twice[0])} twice: give each adapter a name of its own.")
        if len(names) != stacked_count(params):
            raise InputError(
                f"adapters has {len(names)} names and the tree {stacked_count(params)} adapters that rows can choose:"
                " name each one that was given to stack_adapters."
            )
        self._params, self._places = params, {name: place for place, name in enumerate(names, start=1)}
        self._chosen = lru_cache(_KEPT)(lambda places: choose_adapters(params, places))

    def place(self, name: str | None) -> int:
        """An adapter's place in the stack, counted from 1; 0 for none.

        Raises:
            InputError: if there is none of this name.
        """
        if name is None:
            return 0
        if name not in self._places:
            known = ", ".join(map(shown, self._places)) or "none"
            raise InputError(f"adapter is {shown(name)} where the engine has {known}: name one of them, or none.")
        return self._places[name]

    def tree(self, requests: Sequence[Request | None]) -> Params:
        """The tree for a batch of these requests; idle rows are `None`. Without adapters it is always the same."""
        if not self._places:
            return self._params
        return self._chosen(tuple(0 if request is None else self.place(request.adapter) for request in requests))
