"""What Prometheus reads at `/metrics`."""

import time
from collections.abc import Callable, Iterable

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dbrx_fn.serving.prefix_store import PrefixStatistics
from dbrx_fn.serving.statistics import Statistics

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60)
_BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)
"""Seconds, the histograms' bounds."""


class Metrics:
    """A server's metrics, in their own registry.

    Args:
        statistics: returns the engine's.
    """

    def __init__(self, statistics: Callable[[], Statistics]) -> None:
        self._registry = CollectorRegistry()
        # A path that a client made up is no endpoint: there are few labels.
        self._requests = Counter(
            "dbrx_fn_http_requests",
            "HTTP requests answered.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._first = self._histogram("time_to_first_token", "From a request's arrival to its first token.", _FIRST)
        self._between = self._histogram("time_between_tokens", "From a token to the text's next one.", _BETWEEN)
        self._registry.register(_EngineCollector(statistics))
        ProcessCollector(registry=self._registry)

    def answered(self, endpoint: str, status: int) -> None:
        """Counts an HTTP request."""
        self._requests.labels(endpoint, str(status)).inc()

    def clock(self) -> "Clock":
        """Starts measuring a request."""
        return Clock(self._first, self._between)

    def page(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, meaning: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(f"dbrx_fn_{name}_seconds", meaning, buckets=bounds, registry=self._registry)


class Clock:
    """Measures one request."""

    def __init__(self, first: Histogram, between: Histogram) -> None:
        self._first, self._between = first, between
        self._began = time.perf_counter()
        self._last: dict[int, float] = {}

    def token(self, choice: int) -> None:
        """A token of a choice has come."""
        now = time.perf_counter()
        last = self._last.get(choice)
        if last is not None:
            self._between.observe(now - last)
        elif not self._last:
            self._first.observe(now - self._began)
        self._last[choice] = now


class _EngineCollector(Collector):
    """The engine's statistics, read when Prometheus asks."""

    def __init__(self, statistics: Callable[[], Statistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterable[Metric]:
        now = self._statistics()
        requests = GaugeMetricFamily("dbrx_fn_requests", "Texts asked for, by what they wait for.", labels=["state"])
        for state, count in (("waiting", now.waiting), ("reading", now.reading), ("decoding", now.decoding)):
            requests.add_metric([state], count)
        yield requests
        yield GaugeMetricFamily("dbrx_fn_rows", "Rows of the batch that decodes, idle ones too.", now.rows)
        yield GaugeMetricFamily("dbrx_fn_cache_positions", "Positions of that batch's cache.", now.positions)
        finished = CounterMetricFamily("dbrx_fn_finished", "Texts that ended, by how.", labels=["reason"])
        for reason, count in now.finished:
            finished.add_metric([reason], count)
        yield finished
        tokens = CounterMetricFamily("dbrx_fn_tokens", "Tokens; cached ones are prompts' too.", labels=["kind"])
        for kind, count in (("prompt", now.prompt_tokens), ("cached", now.cached_tokens), ("made", now.made_tokens)):
            tokens.add_metric([kind], count)
        yield tokens
        yield CounterMetricFamily("dbrx_fn_put_aside", "Times that a text lost its cache to others.", now.put_aside)
        if now.prefixes is not None:
            yield from _prefix_figures(now.prefixes)
        memory = GaugeMetricFamily("dbrx_fn_device_memory_bytes", "Memory that MLX holds.", labels=["kind"])
        for kind, nbytes in (
            ("active", mx.get_active_memory()),
            ("cached", mx.get_cache_memory()),
            ("peak", mx.get_peak_memory()),
        ):
            memory.add_metric([kind], nbytes)
        yield memory


def _prefix_figures(now: PrefixStatistics) -> Iterable[Metric]:
    lookups = CounterMetricFamily("dbrx_fn_prefix_lookups", "Texts looked up.", labels=["result"])
    lookups.add_metric(["hit"], now.hits)
    lookups.add_metric(["miss"], now.misses)
    held = GaugeMetricFamily("dbrx_fn_prefix_bytes", "Beginnings that are kept.", labels=["place"])
    held.add_metric(["memory"], now.memory_bytes)
    held.add_metric(["disk"], now.disk_bytes)
    given_up = CounterMetricFamily("dbrx_fn_prefix_evictions", "Chunks given up for others.", labels=["place"])
    given_up.add_metric(["memory"], now.memory_evictions)
    given_up.add_metric(["disk"], now.disk_evictions)
    yield from (lookups, held, given_up)
    yield CounterMetricFamily("dbrx_fn_prefix_dropped", "Chunks that couldn't be written to disk.", now.dropped)
    yield CounterMetricFamily("dbrx_fn_prefix_spoilt", "Files that were damaged or missing.", now.spoilt)
