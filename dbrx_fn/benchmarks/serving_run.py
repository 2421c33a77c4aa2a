"""A serving benchmark from its server's start to its end."""

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

from dbrx_fn.benchmarks.completions_client import Endpoint, find_endpoint
from dbrx_fn.benchmarks.http_client import read_url
from dbrx_fn.benchmarks.load import Limits, Load, Workload
from dbrx_fn.benchmarks.server_child import served
from dbrx_fn.benchmarks.serving import ServingFigure, measure_serving

_WORDS = 64
"""Number of words of the trial's prompt."""


@dataclass(frozen=True)
class Measured:
    """What was measured. `server`: its name in reports. `figures`: one per load, at least one."""

    server: str
    endpoint: Endpoint
    workload: Workload
    limits: Limits
    figures: list[ServingFigure]


def run_serving(
    server: str | Sequence[str],
    model: str | None,
    api_key: str | None,
    temperature: float,
    workload: Workload,
    loads: Sequence[Load],
    limits: Limits,
) -> Measured:
    """Measures a server under each load.

    Args:
        server: the URL of a running server, or options with which this package's server is started and later ended.
        model: the model's name in the requests to a URL, if it needs one.
        api_key: sent with each request.
        temperature: of each request.
        workload: the requests.
        loads: at least one.
        limits: the limits of a good answer.

    Raises:
        InputError: if the server doesn't start, can't be reached, or answers no request.
    """

    async def measure(url: str, name: str | None) -> tuple[Endpoint, list[ServingFigure]]:
        words = list(islice(workload.words(0), _WORDS))
        endpoint = await find_endpoint(read_url(url, api_key), name, temperature, words, workload.answer)
        return endpoint, await measure_serving(endpoint, workload, loads, limits)

    is_url = isinstance(server, str)
    with nullcontext(server) if isinstance(server, str) else served(server) as url:
        endpoint, figures = asyncio.run(measure(url, model if is_url else None))
    name = url if is_url else endpoint.model or "this package's server"
    return Measured(name, endpoint, workload, limits, figures)
