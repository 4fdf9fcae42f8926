"""`GET /metrics`: this node in the text format of Prometheus.

The counts are those of `Metrics`; what a node has at the moment (slots, breakers, peers) is looked
at when somebody asks. The text is written here rather than by `prometheus_client`: its counters
take several times as long for each request, and bound no labels.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Literal, NamedTuple

import psutil
import trio

from ..mesh.backend_id import BackendId
from .http_server import Request, Responder
from .metrics import BUCKETS, Asked, Counts, Histogram, Metrics, Tried
from .parts import Parts, version
from .routes import Routes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Family(NamedTuple):
    """A metric: its type, its labels, and what it means."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


#: All that there are, in the order in which they are told.
_ALL = (
    Family("promptmesh_info", "gauge", ("version", "peer"), "Always 1: this node."),
    Family(
        "promptmesh_requests_total",
        "counter",
        Asked._fields,
        "Requests that ended, by who gave the answer and how it ended.",
    ),
    Family("promptmesh_requests_running", "gauge", ("asker",), "Requests that have not ended yet."),
    Family(
        "promptmesh_attempts_total",
        "counter",
        Tried._fields,
        "Providers that were asked; more than one for a request where the first failed.",
    ),
    Family(
        "promptmesh_tokens_total",
        "counter",
        ("direction", "provider", "model", "cache"),
        "Tokens of whole answers, computed or from the cache.",
    ),
    Family(
        "promptmesh_first_token_seconds",
        "histogram",
        ("task", "provider", "model"),
        "Seconds from a request's beginning to the first token of a provider.",
    ),
    Family(
        "promptmesh_answer_seconds",
        "histogram",
        ("task", "provider", "model"),
        "Seconds from a request's beginning to the end of a whole answer.",
    ),
    Family(
        "promptmesh_provider_state",
        "gauge",
        ("provider", "kind", "state"),
        "1 for the state that this node's provider is in, 0 for the others.",
    ),
    Family(
        "promptmesh_provider_paused",
        "gauge",
        ("provider",),
        "1 while it is left alone, as it failed (its breaker is open).",
    ),
    Family(
        "promptmesh_provider_running",
        "gauge",
        ("provider",),
        "Requests that have a slot of it.",
    ),
    Family(
        "promptmesh_provider_waiting",
        "gauge",
        ("provider",),
        "Requests that wait for a slot of it.",
    ),
    Family("promptmesh_provider_slots", "gauge", ("provider",), "Slots that it has."),
    Family("promptmesh_peers", "gauge", ("state",), "Members of the mesh that this node knows."),
    Family(
        "promptmesh_peer_providers",
        "gauge",
        ("state",),
        "Providers of the connected members: in the state that these tell, or left alone by us.",
    ),
    Family("promptmesh_cache_answers", "gauge", (), "Answers that are stored here."),
    Family("promptmesh_cache_bytes", "gauge", (), "Bytes that they take."),
    Family("process_start_time_seconds", "gauge", (), "When it was started (Unix time)."),
    Family("process_cpu_seconds_total", "counter", (), "Seconds of processor time that it took."),
    Family("process_resident_memory_bytes", "gauge", (), "Memory that it has."),
    Family("process_open_fds", "gauge", (), "Files and sockets that it has open."),
)
FAMILIES = {family.name: family for family in _ALL}

_STATES = ("ready", "starting", "unavailable")
_PEER_STATES = ("connected", "known", "unreachable")
#: A name, its labels' values, and the number.
_Sample = tuple[str, tuple[str, ...], float]


class MetricsApi:
    """The handler of `/metrics`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def add_to(self, routes: Routes) -> None:
        """Answer the path."""
        routes.add("GET", "/metrics", self.metrics)

    async def metrics(self, request: Request, responder: Responder) -> None:
        """`GET /metrics`."""
        stat = await self._parts.answers.stat(now=time.time())
        samples = [*self._counts(self._parts.metrics), *self._providers(), *self._peers()]
        samples += [
            ("promptmesh_cache_answers", (), stat.answers),
            ("promptmesh_cache_bytes", (), stat.bytes),
            *_process(),
        ]
        requests = self._parts.metrics.requests
        histograms = {
            "promptmesh_first_token_seconds": _merged(requests, lambda c: c.first_token),
            "promptmesh_answer_seconds": _merged(requests, lambda c: c.whole),
        }
        body = exposition(samples, histograms).encode()
        await responder.send(200, body, content_type=CONTENT_TYPE)

    def _counts(self, metrics: Metrics) -> Iterator[_Sample]:
        yield "promptmesh_info", (version(), self._parts.peer), 1
        tokens: Counter[tuple[str, ...]] = Counter()
        for asked, counts in metrics.requests.items():
            yield "promptmesh_requests_total", asked, counts.number
            if asked.outcome == "answered":
                answer = asked.provider, asked.model, asked.cache
                tokens["prompt", *answer] += counts.prompt_tokens
                tokens["completion", *answer] += counts.completion_tokens
        for asker, number in metrics.running.items():
            yield "promptmesh_requests_running", (asker,), number
        for tried, number in metrics.tried.items():
            yield "promptmesh_attempts_total", tried, number
        for labels, number in tokens.items():
            yield "promptmesh_tokens_total", labels, number

    def _providers(self) -> Iterator[_Sample]:
        for own in self._parts.providers:
            name = own.name
            for state in _STATES:
                labels = (name, own.kind, state)
                yield "promptmesh_provider_state", labels, own.health.state == state
            load = own.load()
            paused = self._is_paused(BackendId(self._parts.peer, name))
            yield "promptmesh_provider_paused", (name,), paused
            yield "promptmesh_provider_running", (name,), load.running
            yield "promptmesh_provider_waiting", (name,), load.waiting
            yield "promptmesh_provider_slots", (name,), load.slots

    def _peers(self) -> Iterator[_Sample]:
        peers = [peer for peer in self._parts.peers if not peer.foreign]
        states: Counter[str] = Counter(peer.state for peer in peers)
        for state in _PEER_STATES:
            yield "promptmesh_peers", (state,), states[state]
        offered: Counter[str] = Counter(
            "paused" if self._is_paused(BackendId(peer.peer, provider.name)) else provider.state
            for peer in peers
            if peer.state == "connected"
            for provider in peer.providers
        )
        for each in (*_STATES, "paused"):
            yield "promptmesh_peer_providers", (each,), offered[each]

    def _is_paused(self, backend: BackendId) -> bool:
        breakers = self._parts.backends.experience.breakers
        return breakers.refusal(backend, trio.current_time()) is not None


def _merged(
    requests: Mapping[Asked, Counts], which: Callable[[Counts], Histogram]
) -> dict[tuple[str, ...], Histogram]:
    """The histograms by their own labels, which are fewer."""
    found: dict[tuple[str, ...], Histogram] = {}
    for asked, counts in requests.items():
        histogram = which(counts)
        if any(histogram.counts):
            labels = asked.task, asked.provider, asked.model
            found.setdefault(labels, Histogram()).merge(histogram)
    return found


def _process() -> Iterator[_Sample]:
    process = psutil.Process()
    with process.oneshot():
        times = process.cpu_times()
        yield "process_start_time_seconds", (), process.create_time()
        yield "process_cpu_seconds_total", (), times.user + times.system
        yield "process_resident_memory_bytes", (), process.memory_info().rss
        yield "process_open_fds", (), process.num_fds()


# --- the format -----------------------------------------------------------------------------------


def exposition(
    samples: list[_Sample], histograms: Mapping[str, Mapping[tuple[str, ...], Histogram]]
) -> str:
    """The text: each metric's lines together, behind what it means."""
    lines: dict[str, list[str]] = {name: [] for name in FAMILIES}
    for name, values, number in samples:
        lines[name].append(_line(name, FAMILIES[name].labels, values, number))
    for name, series in histograms.items():
        for labels, histogram in series.items():
            lines[name] += _histogram(name, FAMILIES[name].labels, labels, histogram)
    text = []
    for family in FAMILIES.values():
        text.append(f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.type}\n")
        text += lines[family.name]
    return "".join(text)


def _histogram(
    name: str, labels: tuple[str, ...], values: tuple[str, ...], histogram: Histogram
) -> Iterator[str]:
    bounds = [*map(repr, BUCKETS), "+Inf"]
    for bound, number in zip(bounds, accumulate(histogram.counts), strict=True):
        yield _line(f"{name}_bucket", (*labels, "le"), (*values, bound), number)
    yield _line(f"{name}_sum", labels, values, histogram.sum)
    yield _line(f"{name}_count", labels, values, sum(histogram.counts))


def _line(name: str, labels: tuple[str, ...], values: tuple[str, ...], number: float) -> str:
    said = ",".join(f'{k}="{_escaped(v)}"' for k, v in zip(labels, values, strict=True))
    return f"{name}{{{said}}} {float(number)!r}\n" if said else f"{name} {float(number)!r}\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
