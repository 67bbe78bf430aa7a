"""Metrics in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hermes_async import Chunk, Completion, Engine
from hermes_async.errors import EngineError

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)

_COUNTERS = {
    "bytes_read": "Bytes of weights that were read from disk.",
    "sweeps": "Passes over the weights.",
    "tokens_generated": "Tokens of all answers.",
    "drafted_tokens": "Tokens that were drafted and verified.",
    "accepted_tokens": "Drafted tokens that were right.",
    "read_seconds": "Seconds of reading, summed over the loading agents.",
    "compute_seconds": "Seconds of computing.",
    "stall_seconds": "Seconds that computing waited for weights.",
    "expert_hits": "Experts that were in memory when a pass asked for them.",
    "expert_misses": "Experts that had to be read when a pass asked for them.",
    "experts_read_ahead": "Experts that were read before a pass asked for them.",
    "prefix_hits": "Requests that found the beginning of their prompt in memory.",
    "prefix_tokens": "Prompt tokens that were not computed for that reason.",
    "num_parkings": "Times that a session's KV was written to disk.",
}
_GAUGES = {
    "bytes_resident": "Bytes of weights that stay in memory.",
    "bytes_lent": "Bytes of weights in memory that is set aside for sequences.",
    "bytes_beside_budget": "The most bytes that the process took beside baseline and leases.",
    "bytes_in_use": "Bytes that are leased from the budget.",
    "peak_bytes_in_use": "The most bytes that were leased at once.",
    "memory_budget": "Bytes that may be leased.",
    "num_experts": "Experts of all layers that are read one by one.",
    "num_experts_in_memory": "Those of them that are in memory.",
    "expert_bytes": "Bytes of experts in memory.",
    "kv_bytes": "Bytes of keys and values.",
    "prefix_bytes": "Bytes of kept prefixes that nobody uses now.",
    "num_running": "Requests that generate, or whose prompts are computed.",
    "num_paused": "Running requests whose client does not read.",
    "num_waiting": "Requests that wait.",
    "num_sessions": "Open sessions.",
    "num_forwards": "Forward passes that wait or run.",
    "process_peak_rss_bytes": "The most resident memory that the process had.",
}


class RequestMetrics:
    """Counts of the server's requests, and the engine's statistics, which are read when metrics are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._requests = Counter(
            "hermes_async_requests",
            "HTTP requests that were answered or refused.",
            ["route", "status"],
            registry=self._registry,
        )
        self._encoded_tokens = Counter(
            "hermes_async_encoded_tokens", "Tokens of texts that were embedded or ranked.", registry=self._registry
        )
        self._answers = Counter(
            "hermes_async_answers", "Answers that have ended.", ["finish_reason"], registry=self._registry
        )
        self._first_token = Histogram(
            "hermes_async_time_to_first_token_seconds",
            "Seconds from a request to its first token.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._queued = Histogram(
            "hermes_async_queue_seconds",
            "Seconds from a request to its admission.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._total = Histogram(
            "hermes_async_request_seconds", "Seconds of a request.", registry=self._registry, buckets=_SECONDS
        )
        self._prompt_tokens = Histogram(
            "hermes_async_prompt_tokens", "Tokens of a prompt.", registry=self._registry, buckets=_TOKENS
        )
        self._completion_tokens = Histogram(
            "hermes_async_completion_tokens", "Tokens of an answer.", registry=self._registry, buckets=_TOKENS
        )

    def count_request(self, route: str, status: int) -> None:
        """Counts an HTTP request.

        Args:
            route: The path of the route, not that of the request: clients could make any number of those.
        """
        self._requests.labels(route, status).inc()

    def count_encoded(self, num_tokens: int) -> None:
        """Counts the tokens of a request for vectors or scores."""
        self._encoded_tokens.inc(num_tokens)

    def count_answer(self, ended: Completion | Chunk) -> None:
        """Counts an answer that has ended without an error, by the whole of it or its last chunk."""
        usage, timings = ended.usage, ended.timings
        assert usage is not None and timings is not None
        self._answers.labels(ended.finish_reason).inc()
        self._first_token.observe(timings.first_token_s)
        self._queued.observe(timings.queued_s)
        self._total.observe(timings.total_s)
        self._prompt_tokens.observe(usage.prompt_tokens)
        self._completion_tokens.observe(usage.completion_tokens)

    def text(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self._registry)


class RequestCounter:
    """Counts all requests of an application by route and status, those that are refused included."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # what is sent outside of this, if an error was not expected

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            self._metrics.count_request(getattr(scope.get("route"), "path", "other"), status)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        try:
            statistics = self._engine.statistics()
        except EngineError:  # not opened yet
            return
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"hermes_async_{name}", text, value=getattr(statistics, name))
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"hermes_async_{name}", text, value=getattr(statistics, name))
        lags = GaugeMetricFamily(
            "hermes_async_loop_lag_seconds",
            "How late the event loop ran what was due, in the last minute of work.",
            labels=["quantile"],
        )
        for name, quantile in (("p50", "0.5"), ("p99", "0.99"), ("max", "1")):
            lags.add_metric([quantile], statistics.loop_lag_ms[name] / 1000)
        yield lags
        kinds = CounterMetricFamily(
            "hermes_async_kind_bytes_read", "Bytes that were read from disk, by kind.", labels=["kind"]
        )
        for kind, nbytes in statistics.bytes_read_by_kind.items():
            kinds.add_metric([kind], nbytes)
        yield kinds
        holders = GaugeMetricFamily("hermes_async_held_bytes", "Leased bytes, by holder.", labels=["holder"])
        kv_bytes = 0
        for holder, nbytes in statistics.holders.items():
            if holder.startswith("KV of "):  # one for each request: too many series, and they hold ids
                kv_bytes += nbytes
            else:
                holders.add_metric([holder], nbytes)
        holders.add_metric(["KV of requests"], kv_bytes)
        yield holders
