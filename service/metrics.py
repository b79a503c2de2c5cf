"""What /metrics shows: vLLM's names where the same thing exists, so its dashboards work, and the routes."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from routers.policy import Route
from service.engines.base import EngineError, Job, Piece, Status

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROUTE_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)
MARGINS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
EXPERT = ("model_name",)


class Metrics:
    """One app's numbers, in a registry of its own."""

    def __init__(self, experts: Sequence[str]) -> None:
        self._registry = own = CollectorRegistry()
        self._running = Gauge("vllm:num_requests_running", "Requests being answered.", EXPERT, registry=own)
        self._prompt = Counter("vllm:prompt_tokens", "Prompt tokens taken.", EXPERT, registry=own)
        self._generated = Counter("vllm:generation_tokens", "Tokens generated.", EXPERT, registry=own)
        self._ended = Counter(
            "vllm:request_success", "Requests by how they ended.", (*EXPERT, "finished_reason"), registry=own
        )
        self._first = Histogram(
            "vllm:time_to_first_token_seconds",
            "From the route to the first piece.",
            EXPERT,
            registry=own,
            buckets=SECONDS,
        )
        self._between = Histogram(
            "vllm:inter_token_latency_seconds", "Between two pieces.", EXPERT, registry=own, buckets=SECONDS
        )
        self._whole = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From the route to the last piece.",
            EXPERT,
            registry=own,
            buckets=SECONDS,
        )
        self._answer = Histogram(
            "vllm:request_generation_tokens", "Tokens of an answer.", EXPERT, registry=own, buckets=TOKENS
        )
        self._ready = Gauge("modelglue_expert_ready", "1 when the expert can answer.", EXPERT, registry=own)
        self._routes = Counter(
            "modelglue_route_decisions", "Requests by expert and reason.", (*EXPERT, "reason"), registry=own
        )
        self._seconds = Histogram(
            "modelglue_route_seconds", "Time to decide a route.", registry=own, buckets=ROUTE_SECONDS
        )
        self._margin = Histogram(
            "modelglue_route_margin", "Score of the first expert over the second.", registry=own, buckets=MARGINS
        )
        for expert in experts:  # a series that exists from the start has a rate from its first request on
            for metric in (self._running, self._prompt, self._generated, self._first, self._whole):
                metric.labels(expert)

    def decided(self, route: Route, seconds: float) -> None:
        """Count the route of a request that is going to be answered."""
        self._routes.labels(route.expert, route.reason).inc()
        self._seconds.observe(seconds)
        if route.reason == "top_score":
            self._margin.observe(route.margin)

    async def metered(self, job: Job, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        """The same pieces, counted and timed; a reader who leaves counts as an abort."""
        began = last = time.perf_counter()
        latency = self._first
        tokens, ended = 0, "abort"
        self._prompt.labels(job.expert).inc(len(job.tokens))
        self._running.labels(job.expert).inc()
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    now = time.perf_counter()
                    latency.labels(job.expert).observe(now - last)
                    latency, last = self._between, now
                    tokens += piece.tokens
                    ended = piece.finish or ended
                    yield piece
        except EngineError:
            ended = "error"
            raise
        finally:
            self._running.labels(job.expert).dec()
            self._generated.labels(job.expert).inc(tokens)
            self._answer.labels(job.expert).observe(tokens)
            self._ended.labels(job.expert, ended).inc()
            self._whole.labels(job.expert).observe(time.perf_counter() - began)

    def exposition(self, states: Mapping[str, Status]) -> bytes:
        """Everything in Prometheus' text format."""
        for expert, status in states.items():
            self._ready.labels(expert).set(status.state == "ready")
        return generate_latest(self._registry)
