"""What /metrics shows: vLLM's names where the same thing exists, so its dashboards work, and the routes.

What the engine counts is read when somebody asks. Of a remote expert's requests, only its server knows how long they
waited before their prefill.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from routers.policy import Route
from service.engines.base import Job, Load, Piece, Status, Usage

if TYPE_CHECKING:  # a record has completions, which are counted here
    from service.record import Record

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROUTE_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)
MARGINS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
ANSWERS = (1, 2, 5, 10, 20, 50, 100)
EXPERT = ("model_name",)
REJECTED = (429, 503)

Family = CounterMetricFamily | GaugeMetricFamily
OF_LOADS: Sequence[tuple[type[Family], str, str, Callable[[Load], float]]] = (
    (GaugeMetricFamily, "vllm:num_requests_running", "Being answered.", lambda load: load.running),
    (GaugeMetricFamily, "vllm:num_requests_waiting", "In the queue.", lambda load: load.waiting),
    (GaugeMetricFamily, "vllm:kv_cache_usage_perc", "Share of all experts' key-value memory.", lambda load: load.kv),
    (CounterMetricFamily, "vllm:prefix_cache_queries", "Prompt tokens looked up.", lambda load: load.queries),
    (CounterMetricFamily, "vllm:prefix_cache_hits", "Those that were cached.", lambda load: load.hits),
    (CounterMetricFamily, "vllm:num_preemptions", "Requests that gave way for memory.", lambda load: load.preemptions),
    (CounterMetricFamily, "modelglue_expert_evictions", "Times that weights made room.", lambda load: load.evictions),
    (GaugeMetricFamily, "modelglue_expert_resident", "1 when its weights are in place.", lambda load: load.resident),
)


class Metrics:
    """One app's numbers, in a registry of its own."""

    def __init__(self, experts: Sequence[str]) -> None:
        self._registry = own = CollectorRegistry()
        self._engine = EngineNumbers()
        own.register(self._engine)

        def histogram(
            name: str, what: str, labels: Sequence[str] = EXPERT, buckets: Sequence[float] = SECONDS
        ) -> Histogram:
            return Histogram(name, what, labels, registry=own, buckets=buckets)

        def counter(name: str, what: str, labels: Sequence[str] = EXPERT) -> Counter:
            return Counter(name, what, labels, registry=own)

        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens taken.")
        self._cached = counter("vllm:prompt_tokens_cached", "Prompt tokens that were not computed anew.")
        self._generated = counter("vllm:generation_tokens", "Tokens generated.")
        self._ended = counter("vllm:request_success", "Answers by how they ended.", (*EXPERT, "finished_reason"))
        self._first = histogram("vllm:time_to_first_token_seconds", "From the route to the first piece.")
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two pieces.")
        self._queued = histogram("vllm:request_queue_time_seconds", "Until the prompt's first token was computed.")
        self._prefill = histogram("vllm:request_prefill_time_seconds", "From then to the first piece.")
        self._decode = histogram("vllm:request_decode_time_seconds", "From the first piece to the last.")
        self._each = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Of an answer's decoding, for each token after the first piece.",
        )
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From the route to the last piece.")
        self._asked = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", buckets=TOKENS)
        self._answer = histogram("vllm:request_generation_tokens", "Tokens of an answer.", buckets=TOKENS)
        self._n = histogram("vllm:request_params_n", "Answers asked for.", buckets=ANSWERS)
        self._most = histogram("vllm:request_params_max_tokens", "Tokens of an answer asked for.", buckets=TOKENS)
        self._rejected = counter("vllm:admission_rejections", "Requests with 429 or 503, by why.", ("reason",))
        self._requests = counter("modelglue_http_requests", "Requests by what they got.", ("endpoint", "status"))
        self._loaded = Gauge("modelglue_expert_load_seconds", "From the start to ready.", EXPERT, registry=own)
        self._routes = counter("modelglue_route_decisions", "Prompts by expert and reason.", (*EXPERT, "reason"))
        self._seconds = histogram("modelglue_route_seconds", "Time to decide a route.", (), ROUTE_SECONDS)
        self._margin = histogram("modelglue_route_margin", "Score of the first expert over the second.", (), MARGINS)
        self._unlogged = counter("modelglue_route_log_lost", "Decisions that the route log could not keep.", ())
        self._reloads = counter("modelglue_router_reloads", "Attempts to reload the router.", ("result",))
        for expert in experts:  # a series that exists from the start has a rate from its first request on
            for metric in (self._prompt, self._cached, self._generated, self._first, self._whole):
                metric.labels(expert)
        for result in ("taken", "refused"):
            self._reloads.labels(result)

    def decided(self, route: Route, seconds: float) -> None:
        """Count the route of a request that is going to be answered."""
        self._routes.labels(route.expert, route.reason).inc()
        self._seconds.observe(seconds)
        if route.reason == "top_score":
            self._margin.observe(route.margin)

    def ended(self, record: Record) -> None:
        """Count a request that has ended."""
        self._requests.labels(record.endpoint, str(record.status)).inc()
        if record.status in REJECTED:
            self._rejected.labels(record.code or "other").inc()
        for part in record.parts:
            expert = part.decision.route.expert
            self._n.labels(expert).observe(part.request.n)
            if part.request.sampling.max_tokens is not None:
                self._most.labels(expert).observe(part.request.sampling.max_tokens)

    def loaded(self, expert: str, seconds: float) -> None:
        """An expert can answer, so long after the start."""
        self._loaded.labels(expert).set(seconds)

    def unlogged(self, decisions: int) -> None:
        """Decisions are lost to the route log."""
        self._unlogged.inc(decisions)

    def reloaded(self, taken: bool) -> None:
        """A router was to be replaced."""
        self._reloads.labels("taken" if taken else "refused").inc()

    async def metered(self, job: Job, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        """The same pieces, counted and timed; a reader who leaves counts as an abort."""
        began = last = time.perf_counter()
        first: float | None = None
        tokens, first_tokens, ended = 0, 0, "abort"
        usage = Usage(len(job.tokens))
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    now = time.perf_counter()
                    if first is None:
                        first, first_tokens = now, piece.tokens
                        self._first.labels(job.expert).observe(now - began)
                    else:
                        self._between.labels(job.expert).observe(now - last)
                    last = now
                    tokens += piece.tokens
                    usage = piece.usage or usage
                    ended = piece.finish or ended
                    yield piece
        except Exception:
            ended = "error"
            raise
        finally:
            self._prompt.labels(job.expert).inc(usage.prompt)
            self._cached.labels(job.expert).inc(usage.cached)
            self._asked.labels(job.expert).observe(usage.prompt)
            self._generated.labels(job.expert).inc(tokens)
            self._answer.labels(job.expert).observe(tokens)
            self._ended.labels(job.expert, ended).inc()
            self._whole.labels(job.expert).observe(time.perf_counter() - began)
            if first is not None:
                if usage.queued is not None:
                    self._queued.labels(job.expert).observe(usage.queued)
                    self._prefill.labels(job.expert).observe(max(first - began - usage.queued, 0))
                self._decode.labels(job.expert).observe(last - first)
                if tokens > first_tokens:
                    self._each.labels(job.expert).observe((last - first) / (tokens - first_tokens))

    def exposition(self, states: Mapping[str, Status], loads: Mapping[str, Load]) -> bytes:
        """Everything in Prometheus' text format."""
        self._engine.states, self._engine.loads = states, loads
        return generate_latest(self._registry)


class EngineNumbers:
    """What the engine says of every expert, as it said it last."""

    def __init__(self) -> None:
        self.states: Mapping[str, Status] = {}
        self.loads: Mapping[str, Load] = {}

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        for family, name, what, number in OF_LOADS:
            yield _filled(family(name, what, labels=EXPERT), {each: number(load) for each, load in self.loads.items()})
        ready = {name: status.state == "ready" for name, status in self.states.items()}
        yield _filled(GaugeMetricFamily("modelglue_expert_ready", "1 when it can answer.", labels=EXPERT), ready)


def _filled(family: Family, values: Mapping[str, float]) -> Family:
    for expert, value in values.items():
        family.add_metric([expert], value)
    return family
