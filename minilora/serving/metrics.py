"""What the server counts, as GET /metrics writes it for Prometheus.

    minilora_requests_total{model, outcome}          answers by how they ended: stop, length, cancelled,
                                                     error, refused (a client's mistake), full (429)
    minilora_requests_running, _waiting              now
    minilora_slots, minilora_slot_tokens             how many answers fit, and how long they may be
    minilora_prompt_tokens_total, _generation_tokens_total, _steps_total
    minilora_time_to_first_token_seconds             from the request's arrival
    minilora_time_per_output_token_seconds           of the later ones, the mean of each answer
    minilora_memory_peak_bytes{device}               of the process so far; of PyTorch's allocator on a GPU
    minilora_adapters{place}, _adapter_bytes{place}  device, memory: how many are there, and their bytes
    minilora_adapter_<event>_total                   of the store: hits, loads_from_memory, loads_from_disk,
                                                     evictions_from_device, evictions_from_memory

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

FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
PLACES = {"device": "on_device", "memory": "in_memory"}
LATER = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The counters of one server."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "minilora_requests", "answers by how they ended", ["model", "outcome"], registry=self.registry
        )
        self.first = Histogram(
            "minilora_time_to_first_token_seconds", "from arrival", buckets=FIRST, registry=self.registry
        )
        self.later = Histogram(
            "minilora_time_per_output_token_seconds",
            "mean of an answer",
            buckets=LATER,
            registry=self.registry,
        )
        self.present = _Present(engine)
        self.registry.register(self.present)

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
            yield CounterMetricFamily(f"minilora_{name}", "since the start", value=value)
        gauges = dict(requests_running=len(engine.rows), requests_waiting=len(engine.waiting))
        gauges |= dict(slots=engine.cache.slots, slot_tokens=engine.cache.max_length)
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"minilora_{name}", "now", value=value)
        yield _by("adapters", "place", {place: len(sizes) for place, sizes in places.items()})
        yield _by("adapter_bytes", "place", {place: sum(sizes.values()) for place, sizes in places.items()})
        device = engine.cache.keys.device
        memory = {kind: memory_used(torch.device(kind)) for kind in dict.fromkeys(["cpu", device.type])}
        yield _by("memory_peak_bytes", "device", memory)


def _by(name: str, label: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"minilora_{name}", "now", labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
