"""What the server counts, for Prometheus: ``GET /metrics``.

A registry of its own, so that several servers can live in one process.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from qat.serve.requests import EngineStats

RATE_SECONDS = 10.0
"""Window of the tokens per second."""
FIRST_TOKEN_BUCKETS = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
"""Seconds."""
NEXT_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2.5)
"""Seconds."""
REQUEST_BUCKETS = (0.05, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
"""Seconds."""


class Metrics:
    """Counters, histograms and gauges of one server."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        """Args: stats: asked at each scrape."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "qat_requests", "Answered requests", ["endpoint", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "qat_request_seconds",
            "From the head of a request to the end of its answer",
            ["endpoint"],
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "qat_requests_in_flight", "Accepted, not yet answered", registry=self.registry
        )
        self.first_token = Histogram(
            "qat_time_to_first_token_seconds",
            "From the acceptance of a sequence to its first token",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.next_token = Histogram(
            "qat_inter_token_seconds",
            "Between two tokens of a sequence",
            buckets=NEXT_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "qat_prompt_tokens", "Tokens of accepted prompts", registry=self.registry
        )
        self.generated_tokens = Counter(
            "qat_generated_tokens", "Tokens generated", registry=self.registry
        )
        self.sequences = Counter(
            "qat_sequences", "Ended sequences by reason", ["reason"], registry=self.registry
        )
        self._recent: deque[tuple[int, int]] = deque()
        self.registry.register(_Snapshot(self, stats))
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def count_token(self) -> None:
        """One more generated token."""
        self.generated_tokens.inc()
        second = int(time.monotonic())
        if self._recent and self._recent[-1][0] == second:
            self._recent[-1] = (second, self._recent[-1][1] + 1)
        else:
            self._recent.append((second, 1))
        while self._recent[0][0] < second - RATE_SECONDS:
            self._recent.popleft()

    def tokens_per_second(self) -> float:
        """Mean over the last `RATE_SECONDS`."""
        oldest = time.monotonic() - RATE_SECONDS
        return sum(count for second, count in list(self._recent) if second > oldest) / RATE_SECONDS


class Clock:
    """Times of one sequence."""

    def __init__(self, metrics: Metrics) -> None:
        """The sequence is accepted now."""
        self._metrics, self._last = metrics, time.perf_counter()
        self._first = True
        self._done = False

    def token(self) -> None:
        """A token has arrived."""
        now = time.perf_counter()
        histogram = self._metrics.first_token if self._first else self._metrics.next_token
        histogram.observe(now - self._last)
        self._last, self._first = now, False
        self._metrics.count_token()

    def finish(self, reason: str) -> None:
        """The sequence has ended; only the first call counts."""
        if not self._done:
            self._done = True
            self._metrics.sequences.labels(reason).inc()


class _Snapshot(Collector):
    """The engine's state and the memory, read at each scrape."""

    def __init__(self, metrics: Metrics, stats: Callable[[], EngineStats]) -> None:
        self._metrics, self._stats = metrics, stats

    def collect(self) -> Iterator[GaugeMetricFamily]:
        stats = self._stats()
        rows = {
            "qat_tokens_per_second": (
                f"Tokens generated per second, mean over {RATE_SECONDS:.0f} s",
                self._metrics.tokens_per_second(),
            ),
            "qat_waiting_sequences": ("Accepted, not yet in a batch", stats.waiting),
            "qat_running_sequences": ("Batch size: sequences in the steps", stats.running),
            "qat_batch_tokens": ("Tokens of the last step", stats.batch_tokens),
            "qat_cache_tokens_used": ("Key-value slots in use", stats.cache_tokens_used),
            "qat_cache_tokens": ("Key-value slots in all", stats.cache_tokens),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            rows["qat_device_memory_bytes"] = (
                "GPU memory that torch holds, all devices",
                sum(torch.cuda.memory_reserved(i) for i in range(torch.cuda.device_count())),
            )
        for name, (meaning, value) in rows.items():
            yield GaugeMetricFamily(name, meaning, value=value)

    def describe(self) -> list[GaugeMetricFamily]:
        # without this, registering would ask an engine that is still loading
        return []
