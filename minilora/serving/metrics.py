"""What the server counts, as GET /metrics writes it for Prometheus.

A name that no model has is counted as model "": clients could otherwise invent labels without end.
"""

import time
from collections.abc import Iterator, Mapping

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from minilora.serving.answers import Piece
from minilora.serving.engine import Engine
from minilora.system.device import memory_used

HELP = {
    "requests": "Answers by model and outcome: stop, length, cancelled, error, refused (400), full (429).",
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "time_per_output_token_seconds": "Of the tokens behind the first one; the mean of each answer.",
    "prompt_tokens": "Tokens of prompts that were read.",
    "generation_tokens": "Tokens of answers.",
    "steps": "Steps of the engine: each reads the prompts that join, and a token of every running answer.",
    "errors": "Requests that met an error.",
    "adapter_hits": "Adapters that were asked for and on the device already.",
    "adapter_loads_from_memory": "Adapters that were copied from main memory to the device.",
    "adapter_loads_from_disk": "Adapters that were read from their files.",
    "adapter_evictions_from_device": "Adapters that made room on the device for another one.",
    "adapter_evictions_from_memory": "Adapters that made room in main memory for another one.",
    "requests_running": "Answers that grow by a token in each step.",
    "requests_waiting": "Requests that wait for a slot or for room for their adapter.",
    "slots": "Answers that may run at once.",
    "slot_tokens": "Tokens of an answer at most, with its prompt.",
    "adapters": "Adapters that are on the device, and in main memory.",
    "adapter_bytes": "Their bytes.",
    "memory_peak_bytes": "The most memory so far: of the process, and of PyTorch's allocator on a GPU.",
}

FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
PLACES = {"device": "on_device", "memory": "in_memory"}
LATER = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The counters of one server."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.requests = self._new(Counter, "requests", labelnames=["model", "outcome"])
        self.first = self._new(Histogram, "time_to_first_token_seconds", buckets=FIRST)
        self.later = self._new(Histogram, "time_per_output_token_seconds", buckets=LATER)
        self.present = _Present(engine)
        self.registry.register(self.present)

    def _new(self, kind: type, name: str, **options):
        return kind(f"minilora_{name}", HELP[name], registry=self.registry, **options)

    def ended(self, model: str, outcome: str) -> None:
        self.requests.labels(model, outcome).inc()

    def clock(self, model: str) -> "Clock":
        return Clock(self, model)

    def text(self, figures: Mapping[str, int | Mapping[str, int]]) -> bytes:
        """Return everything in Prometheus' format. figures: the adapter store's."""
        self.present.figures = figures
        return generate_latest(self.registry)


class Clock:
    """Times one answer, from now on, and counts how it ends."""

    def __init__(self, metrics: Metrics, model: str):
        self.metrics, self.model, self.came = metrics, model, time.monotonic()
        self.first: float | None = None

    def note(self, piece: Piece) -> None:
        now = time.monotonic()
        if self.first is None and piece.tokens:
            self.first = now
            self.metrics.first.observe(now - self.came)
        if piece.is_last:
            self.metrics.ended(self.model, piece.finish_reason or "error")
            if self.first is not None and piece.tokens > 1:
                self.metrics.later.observe((now - self.first) / (piece.tokens - 1))


class _Present:
    """Collects what the engine and the adapter store know already."""

    def __init__(self, engine: Engine):
        self.engine, self.figures = engine, {}

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        engine, figures = self.engine, dict(self.figures)
        places = {place: figures.pop(f"bytes_{where}", {}) for place, where in PLACES.items()}
        counts = vars(engine.counts) | {f"adapter_{name}": value for name, value in figures.items()}
        for name, value in counts.items():
            yield CounterMetricFamily(f"minilora_{name}", HELP[name], value=value)
        gauges = dict(requests_running=len(engine.rows), requests_waiting=len(engine.waiting))
        gauges |= dict(slots=engine.cache.slots, slot_tokens=engine.cache.max_length)
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"minilora_{name}", HELP[name], value=value)
        yield _by("adapters", "place", {place: len(sizes) for place, sizes in places.items()})
        yield _by("adapter_bytes", "place", {place: sum(sizes.values()) for place, sizes in places.items()})
        device = engine.cache.keys.device
        memory = {kind: memory_used(torch.device(kind)) for kind in dict.fromkeys(["cpu", device.type])}
        yield _by("memory_peak_bytes", "device", memory)


def _by(name: str, label: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"minilora_{name}", HELP[name], labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
