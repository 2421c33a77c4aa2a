"""How the engines of several processes make the same turns: the leader's tells the others what came.

All else that an engine decides follows from its requests and their tokens, which are the same in every process.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dbrx_fn.generation.sampling import Sampling
from dbrx_fn.generation.structured import Structure
from dbrx_fn.runtime.group import group
from dbrx_fn.serving.limits import Limits
from dbrx_fn.serving.request import Event, Receive, Request
from dbrx_fn.serving.served import Served


def shared_messages(
    arrived: list[Served], cancelled: set[int], served: Callable[[Request, Receive, int], Served]
) -> tuple[list[Served], set[int]]:
    """The leader's new requests and cancellations, in every process.

    Args:
        arrived: the requests that came. Empty in the others, as is `cancelled`.
        cancelled: the numbers of requests to end.
        served: makes a request's record, from what receives its events and its number.
    """
    if group().size == 1:
        return arrived, cancelled
    told = group().share([[[one.number, _as_json(one.request)] for one in arrived], sorted(cancelled)])
    if group().leads:
        return arrived, cancelled
    requests, numbers = told
    return [served(_from_json(request), _nobody, number) for number, request in requests], set(numbers)


def shared_limits(own: Callable[[], Limits]) -> Limits:
    """The leader's limits, in every process. `own` makes them of the leader's memory."""
    return Limits(**group().share(asdict(own()) if group().leads else None))


def shielded(receive: Receive, cancel: Callable[[], None]) -> Receive:
    """`receive`, whose failure cancels its request in every process, where there are several."""

    def told(event: Event) -> None:
        try:
            receive(event)
        except Exception:
            if group().size == 1:
                raise
            cancel()

    return told


def _nobody(event: Event) -> None:
    pass


def _as_json(request: Request) -> dict[str, Any]:
    return {**asdict(request), "stop_tokens": sorted(request.stop_tokens)}


def _from_json(fields: dict[str, Any]) -> Request:
    structure = fields["structure"]
    made = {
        "prompt": tuple(fields["prompt"]),
        "sampling": Sampling(**fields["sampling"]),
        "stop_tokens": frozenset(fields["stop_tokens"]),
        "structure": None if structure is None else Structure(**structure),
    }
    return Request(**{**fields, **made})
