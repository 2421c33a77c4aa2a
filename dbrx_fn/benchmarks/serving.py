"""Measures a server of OpenAI's API under load: latencies as its clients see them."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from tqdm import tqdm

from dbrx_fn.benchmarks.completions_client import Answer, Endpoint, ask, read_page
from dbrx_fn.benchmarks.load import Limits, Load, Workload

_BETWEEN_SAMPLES = 0.2
_COUNT = re.compile(rb'^dbrx_fn_(rows|requests\{state="(\w+)"\}) (\d{1,9})\.0$', re.MULTILINE)


@dataclass(frozen=True)
class Percentiles:
    """The 50th, 90th and 99th percentile, in seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class ServingFigure:
    """One load. Times are in seconds.

    `seconds`: from the first request to the end of the last answer.
    `first_token`: from the time when a request was due to its first text. `between_tokens`: from one text to the next,
    over all answers.
    `in_flight`: mean number of requests that were sent and not answered yet.
    `latest`: the longest time from when a request was due until it was sent. It should be short.
    `good`: requests within the limits.
    `waiting`, `most_waiting`, `rows_filled`: mean and highest number of texts in the server's queue, and the mean share
    of its rows with a text; only this package's servers tell.
    `prompt_tokens`, `cached_tokens`: `None` if the server doesn't report them.
    """

    load: Load
    requests: int
    failures: dict[str, int]
    seconds: float
    tokens_per_second: float
    made_tokens: int
    prompt_tokens: int | None
    cached_tokens: int | None
    first_token: Percentiles | None
    between_tokens: Percentiles | None
    in_flight: float
    latest: float
    good: int
    good_per_second: float
    waiting: float | None = None
    most_waiting: int | None = None
    rows_filled: float | None = None

    @property
    def failed(self) -> int:
        """Number of requests without a whole answer."""
        return sum(self.failures.values())


@dataclass(frozen=True)
class _Sample:
    waiting: int
    decoding: int
    rows: int


async def measure_serving(
    endpoint: Endpoint, workload: Workload, loads: Sequence[Load], limits: Limits
) -> list[ServingFigure]:
    """Measures one load after the other."""
    figures = []
    with tqdm(total=len(loads) * workload.requests, unit="request", disable=None, leave=False) as bar:
        for number, load in enumerate(loads, 1):
            bar.set_description(str(load))
            samples: list[_Sample] = []
            sampling = asyncio.create_task(_sample(endpoint, samples))
            try:
                answers = await _answers(endpoint, workload, load, number, bar.update)
            finally:
                sampling.cancel()
            figures.append(serving_figure(load, answers, limits, samples))
    return figures


def serving_figure(
    load: Load, answers: Sequence[Answer], limits: Limits, samples: Sequence[_Sample] = ()
) -> ServingFigure:
    """The figures of one load, which has at least one answer."""
    whole = [answer for answer in answers if answer.failure is None]
    gaps = [gap for answer in whole for gap in _gaps(answer)]
    good = sum(_first(answer) <= limits.first and max(_gaps(answer), default=0) <= limits.between for answer in whole)
    seconds = max(answer.ended for answer in answers) - min(answer.due for answer in answers)
    made = sum(answer.made_tokens for answer in whole)
    rows = sum(sample.rows for sample in samples)
    return ServingFigure(
        load,
        len(answers),
        dict(Counter(answer.failure for answer in answers if answer.failure is not None)),
        seconds,
        tokens_per_second=made / seconds,
        made_tokens=made,
        prompt_tokens=_sum([answer.prompt_tokens for answer in whole]),
        cached_tokens=_sum([answer.cached_tokens for answer in whole]),
        first_token=_percentiles([_first(answer) for answer in whole]),
        between_tokens=_percentiles(gaps),
        in_flight=sum(answer.ended - answer.sent for answer in answers) / seconds,
        latest=max(answer.sent - answer.due for answer in answers),
        good=good,
        good_per_second=good / seconds,
        waiting=sum(sample.waiting for sample in samples) / len(samples) if samples else None,
        most_waiting=max((sample.waiting for sample in samples), default=None),
        # A text counts as decoding a moment before it has a row.
        rows_filled=sum(min(sample.decoding, sample.rows) for sample in samples) / rows if rows else None,
    )


async def _answers(
    endpoint: Endpoint, workload: Workload, load: Load, number: int, progress: Callable[[], object]
) -> list[Answer]:
    words = workload.words(number)
    prompts = [
        " ".join(next(words) for _ in range(max(1, round(tokens * endpoint.words_per_token))))
        for tokens in workload.prompts()
    ]
    asked = list(zip(prompts, workload.answers(), strict=True))
    answers: list[Answer] = []

    async def send(prompt: str, tokens: int, due: float) -> None:
        answers.append(await ask(endpoint, prompt, tokens, due))
        progress()

    async def client(rest: Iterator[tuple[str, int]]) -> None:
        for prompt, tokens in rest:
            await send(prompt, tokens, time.perf_counter())

    async with asyncio.TaskGroup() as group:
        if load.rate is None:
            rest = iter(asked)
            for _ in range(load.clients or 1):
                group.create_task(client(rest))
        else:
            began = time.perf_counter()
            for (prompt, tokens), arrival in zip(asked, workload.arrivals(load.rate), strict=True):
                due = began + arrival
                await asyncio.sleep(due - time.perf_counter())
                group.create_task(send(prompt, tokens, due))
    return answers


async def _sample(endpoint: Endpoint, samples: list[_Sample]) -> None:
    """Reads the metrics of this package's server repeatedly. It ends if the server is another one."""
    while (page := await read_page(endpoint.site, "/metrics")) is not None:
        found = {(state or rows).decode(): int(value) for rows, state, value in _COUNT.findall(page)}
        if not {"rows", "waiting", "decoding"} <= found.keys():
            return
        samples.append(_Sample(found["waiting"], found["decoding"], found["rows"]))
        await asyncio.sleep(_BETWEEN_SAMPLES)


def _first(answer: Answer) -> float:
    """Seconds to the first text, or to the end of an answer without text."""
    return (answer.times[0] if answer.times else answer.ended) - answer.due


def _gaps(answer: Answer) -> list[float]:
    return [later - earlier for earlier, later in pairwise(answer.times)]


def _percentiles(seconds: Sequence[float]) -> Percentiles | None:
    return Percentiles(*np.percentile(seconds, [50, 90, 99]).tolist()) if seconds else None


def _sum(counts: Sequence[int | None]) -> int | None:
    told = [count for count in counts if count is not None]
    return sum(told) if told else None
