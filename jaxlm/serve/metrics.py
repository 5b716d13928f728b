"""`/metrics`: Prometheus' text, with vLLM's names behind `jaxlm:`."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxlm.inference.paged.requests import EngineThread

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_WHOLE = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class _Engine(Collector):
    """The engine's own counts, read when they are asked for."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        used = stats.pages - stats.pages_free - stats.pages_cached
        gauges = {
            "num_requests_running": stats.running,
            "num_requests_waiting": stats.waiting,
            "kv_cache_usage_perc": used / max(1, stats.pages),
            "kv_cache_pages": stats.pages,
            "kv_cache_pages_free": stats.pages_free,
            "kv_cache_pages_cached": stats.pages_cached,
        }
        counters = {
            "prefix_cache_queries": stats.prefix_queries_total,
            "prefix_cache_hits": stats.prefix_hits_total,
            "prompt_tokens": stats.prompt_tokens_total,
            "generation_tokens": stats.generation_tokens_total,
            "num_preemptions": stats.retracted_total,
            "spec_decode_num_draft_tokens": stats.guessed_total,
            "spec_decode_num_accepted_tokens": stats.accepted_total,
        }
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"jaxlm:{name}", f"{name} of the engine", value)
        for name, value in counters.items():
            yield CounterMetricFamily(f"jaxlm:{name}", f"{name} of the engine", value)


class Metrics:
    """What is measured of answers.

    Attributes:
        failed: the error that ended the engine.
    """

    def __init__(self, engine: EngineThread) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(engine))
        self.first = self._histogram("time_to_first_token_seconds", _FIRST)
        self.between = self._histogram("inter_token_latency_seconds", _BETWEEN)
        self.whole = self._histogram("e2e_request_latency_seconds", _WHOLE)
        self.success = Counter("jaxlm:request_success", "answers", ["finished_reason"], registry=self._registry)
        self.failed: str | None = None

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"jaxlm:{name}", f"{name} of an answer", buckets=buckets, registry=self._registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def clock(self, started: float) -> Clock:
        """Watches one answer to a request that came then."""
        return Clock(self, started)


class Clock:
    """The times of one answer."""

    def __init__(self, metrics: Metrics, started: float) -> None:
        self._metrics, self._started = metrics, started
        self._last: float | None = None

    def step(self, now: float, num_tokens: int, finish: str | None) -> None:
        """Tokens have come."""
        if num_tokens and self._last is None:
            self._metrics.first.observe(now - self._started)
        elif num_tokens and self._last is not None:
            for _ in range(num_tokens):
                self._metrics.between.observe((now - self._last) / num_tokens)
        self._last = now if num_tokens else self._last
        if finish is not None:
            self._metrics.whole.observe(now - self._started)
            self._metrics.success.labels(finish).inc()
