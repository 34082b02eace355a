"""What is measured while serving, under vLLM's names where the meaning is the same.

The prefix is ``pronk:``; ``docs/serving.md`` lists all of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from pronk.engine.stats import Stats
from pronk.serve.anomaly import Alarm, Anomalies
from pronk.serve.errors import ApiError

if TYPE_CHECKING:
    from pronk.serve.hosted import Hosted

__all__ = ["Metrics", "ModelMetrics"]

_log = logging.getLogger("pronk.serve")
_LATENCY = (.01, .02, .05, .1, .2, .3, .5, .75, 1, 2, 5, 10, 20, 30, 60, 120)  # fmt: skip
_STEP = (.001, .002, .005, .01, .02, .03, .05, .075, .1, .2, .5, 1, 2, 5)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_RECENT = 60.0  # seconds that the dashboard's percentiles look back
_MOST_RECENT = 4096


class Recent:
    """Values of the last minute, for percentiles; the last ones, where there are very many."""

    def __init__(self) -> None:
        self._times = np.full(_MOST_RECENT, -np.inf)
        self._values = np.zeros(_MOST_RECENT)
        self._next = 0

    def add(self, value: float) -> None:
        """Take a value of now."""
        self._times[self._next], self._values[self._next] = time.monotonic(), value
        self._next = (self._next + 1) % _MOST_RECENT

    def percentiles(self, shares: Sequence[float] = (0.5, 0.9, 0.99)) -> dict[str, float] | None:
        """By name, such as ``p50``; None where there is nothing."""
        values = np.sort(self._values[self._times >= time.monotonic() - _RECENT])
        if not len(values):
            return None
        last = len(values) - 1
        return {f"p{share * 100:g}": float(values[min(last, int(share * len(values)))])
                for share in shares}  # fmt: skip


class ModelMetrics:
    """The series of one model."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._ttft = metrics.ttft.labels(name)
        self._queue = metrics.queue.labels(name)
        self._step = metrics.step.labels(name)
        self._e2e = metrics.e2e.labels(name)
        self._prompt_sizes = metrics.prompt_sizes.labels(name)
        self._generated_sizes = metrics.generated_sizes.labels(name)
        self._done, self._name = metrics.done, name
        self.prompt_tokens = self.generation_tokens = 0
        self.recent = {"ttft": Recent(), "inter_token": Recent(), "e2e": Recent()}
        self.anomalies = Anomalies()

    def began(self, tokens: int) -> None:
        """A prompt of so many tokens was taken."""
        self._prompt_sizes.observe(tokens)
        self.prompt_tokens += tokens

    def first_token(self, seconds: float, waited: float) -> None:
        """A first token came, so long after it was asked for, of which it stood in line."""
        self._ttft.observe(seconds)
        self._queue.observe(waited)
        self.recent["ttft"].add(seconds)
        self._warn(self.anomalies.latency("ttft", seconds))
        self.generation_tokens += 1

    def next_tokens(self, count: int, seconds: float) -> None:
        """So many more tokens came, the last so long after the one before them."""
        each = seconds / count
        for _ in range(count):
            self._step.observe(each)
            self.recent["inter_token"].add(each)
        # One wait, however many tokens it held up, and none where they came with the first: no
        # single value may raise an alarm.
        if seconds > 0:
            self._warn(self.anomalies.latency("inter_token", each))
        self.generation_tokens += count

    def finished(self, reason: str, tokens: int, seconds: float) -> None:
        """A generation ended."""
        self._done.labels(self._name, reason).inc()
        self._e2e.observe(seconds)
        self.recent["e2e"].add(seconds)
        self._generated_sizes.observe(tokens)
        self._warn(self.anomalies.outcome("errors", reason == "error"))

    def _warn(self, alarm: Alarm | None) -> None:
        if alarm is not None:
            _log.warning("%s of %s changed from %.3g to %.3g", alarm.series, self._name,
                         alarm.usual, alarm.now)  # fmt: skip


class Metrics:
    """All series of a server, in a registry of its own.

    Parameters
    ----------
    models : sequence of Hosted
        Their engines are asked when the series are read.
    resident : callable
        Bytes of memory that the process takes now.
    """

    def __init__(self, models: Sequence[Hosted], resident: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self._models, self._resident = models, resident
        label = ["model_name"]

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"pronk:{name}", what, label, buckets=buckets, registry=registry)

        def counter(name: str, what: str, labels: Sequence[str]) -> Counter:
            return Counter(f"pronk:{name}", what, labels, registry=registry)

        self.ttft = histogram("time_to_first_token_seconds", "Until the first token.", _LATENCY)
        self.queue = histogram("request_queue_time_seconds", "Until it first ran.", _LATENCY)
        self.step = histogram("inter_token_latency_seconds", "Between two tokens.", _STEP)
        self.e2e = histogram("e2e_request_latency_seconds", "Of whole generations.", _LATENCY)
        self.prompt_sizes = histogram("request_prompt_tokens", "Tokens of prompts.", _TOKENS)
        self.generated_sizes = histogram("request_generation_tokens", "Tokens of answers.", _TOKENS)
        self.done = counter(
            "request_success", "Generations ended, by reason.", [*label, "finished_reason"]
        )
        self.errors = counter("request_errors", "Requests refused or failed.", ["reason"])
        self.answers = counter("http_requests", "Answers.", ["route", "status"])
        self.guard = counter(
            "guard_actions", "What the guard did.", ["filter", "action", "direction"]
        )
        self._of = {model.name: ModelMetrics(self, model.name) for model in models}
        registry.register(_Engines(models, resident, self._of))

    def of(self, name: str) -> ModelMetrics:
        """The series of a model."""
        return self._of[name]

    def failed(self, error: ApiError, record: MutableMapping[str, Any]) -> None:
        """A request was refused, or failed: its record says so too."""
        self.errors.labels(error.code or str(error.status)).inc()
        record["error"] = error.code

    def guarded(self, name: str, action: str, direction: str) -> None:
        """A filter of the guard acted."""
        self.guard.labels(name, action, direction).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def snapshot(self) -> dict[str, Any]:
        """What the dashboard plots."""
        models = {}
        for model in self._models:
            series, stats = self.of(model.name), model.engine.stats()
            models[model.name] = {
                "running": stats.running,
                "waiting": stats.waiting,
                "kv_usage": _usage(stats),
                "prefix_queries": stats.prefix_queries,
                "prefix_hits": stats.prefix_hits,
                "drafted": stats.drafted_tokens,
                "accepted": stats.accepted_tokens,
                "prompt_tokens": series.prompt_tokens,
                "generated_tokens": series.generation_tokens,
                "planned_bytes": model.memory.total,
                "latency": {k: recent.percentiles() for k, recent in series.recent.items()},
                "anomalies": [
                    {"series": name, "usual": alarm.usual, "now": alarm.now}
                    for name, alarm in series.anomalies.series
                    if alarm is not None
                ],
            }
        return {
            "time": time.time(),
            "resident_bytes": self._resident(),
            "guard": self._guard_actions(),
            "models": models,
        }

    def _guard_actions(self) -> dict[str, int]:
        """How often the guard took each action."""
        counts = dict.fromkeys(("block", "redact", "flag"), 0)
        for family in self.guard.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    counts[sample.labels["action"]] += int(sample.value)
        return counts


def _usage(stats: Stats) -> float:
    """The held share of all KV blocks."""
    blocks = sum(pool.blocks for pool in stats.pools)
    return sum(pool.held for pool in stats.pools) / blocks if blocks else 0.0


class _Engines:
    """Series that are read off the engines when somebody asks."""

    def __init__(
        self, models: Sequence[Hosted], resident: Callable[[], int], of: Mapping[str, ModelMetrics]
    ) -> None:
        self._models, self._resident, self._of = models, resident, of

    def collect(self) -> Iterable[Metric]:
        """The series now."""
        stats = {model.name: model.engine.stats() for model in self._models}
        for name, what, read in (
            ("num_requests_running", "Generations in the engine's steps.", "running"),
            ("num_requests_waiting", "Generations that wait.", "waiting"),
            ("kv_cache_fragmentation", "Share of held positions that are empty.", "fragmentation"),
            ("step_token_budget", "Most tokens of a step now.", "budget"),
        ):
            family = GaugeMetricFamily(f"pronk:{name}", what, labels=["model_name"])
            for model, values in stats.items():
                family.add_metric([model], float(getattr(values, read)))
            yield family
        usage = GaugeMetricFamily(
            "pronk:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.",
            labels=["model_name"],
        )  # fmt: skip
        for model, values in stats.items():
            usage.add_metric([model], _usage(values))
        yield usage
        blocks = GaugeMetricFamily(
            "pronk:kv_cache_blocks", "KV blocks, by state.", labels=["model_name", "state"]
        )
        for model, values in stats.items():
            for state in ("held", "cached", "free"):
                count = sum(getattr(pool, state) for pool in values.pools)
                blocks.add_metric([model, state], float(count))
        yield blocks
        steps: Mapping[str, Any] = stats
        for name, what, of, read in (
            ("prompt_tokens", "Tokens of prompts.", self._of, "prompt_tokens"),
            ("generation_tokens", "Tokens generated.", self._of, "generation_tokens"),
            ("prefix_cache_queries", "Prompt tokens looked up.", steps, "prefix_queries"),
            ("prefix_cache_hits", "Prompt tokens found.", steps, "prefix_hits"),
            ("num_preemptions", "Sequences set back.", steps, "preemptions"),
            ("spec_decode_num_draft_tokens", "Tokens drafted.", steps, "drafted_tokens"),
            ("spec_decode_num_accepted_tokens", "Drafted tokens that stood.", steps,
             "accepted_tokens"),
            ("engine_steps", "Steps run.", steps, "steps"),
        ):  # fmt: skip
            counts = CounterMetricFamily(f"pronk:{name}", what, labels=["model_name"])
            for model, series in of.items():
                counts.add_metric([model], float(getattr(series, read)))
            yield counts
        odd = GaugeMetricFamily(
            "pronk:anomaly", "1 while a series is not as it was.", labels=["model_name", "series"]
        )
        for model, own in self._of.items():
            for one, alarm in own.anomalies.series:
                odd.add_metric([model, one], float(alarm is not None))
        yield odd
        plan = GaugeMetricFamily(
            "pronk:memory_planned_bytes", "Planned memory, by part.", labels=["model_name", "part"]
        )
        for served in self._models:
            for part, size in served.memory.to_dict().items():
                plan.add_metric([served.name, part], float(size))
        yield plan
        yield GaugeMetricFamily(
            "pronk:memory_resident_bytes", "Resident memory of the process.",
            value=float(self._resident()),
        )  # fmt: skip
