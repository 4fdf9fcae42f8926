"""Which backend has seen the beginning of a prompt lately, and so may still hold it. Pure.

Engines keep what they computed of a prompt's beginning: the next turn of a conversation costs less
where the last one was answered. That is worth a score and never more: a backend that is busy or
gone must not hold its conversations.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from ..providers.base import GenerateRequest
from .backend_id import BackendId

#: Characters below which nothing is worth remembering.
MIN_CHARACTERS = 512
#: Prompts that are remembered, and backends for each.
MAX_PREFIXES, MAX_BACKENDS = 4096, 4
#: Seconds in which a backend has forgotten half of what it had seen.
HALF_LIFE = 300.0


class Beginning(NamedTuple):
    """A prompt up to the end of one of its messages, and the share of the whole that it is."""

    digest: bytes
    share: float


def beginnings(request: GenerateRequest) -> Sequence[Beginning]:
    """The beginnings of the prompt, the shortest first; none if it is too short to matter."""
    lengths = []
    total = 0
    for message in request.messages:
        total += len(message.text)
        lengths.append(total)
    if total < MIN_CHARACTERS:
        return ()
    running = hashlib.blake2b(request.model.encode(), digest_size=16)
    running.update(_encode(request.tools))
    found = []
    for message, length in zip(request.messages, lengths, strict=True):
        running.update(_encode(message))
        found.append(Beginning(running.digest(), length / total))
    return found


_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class Affinity:
    """Remembers who has seen which beginnings, and when."""

    _seen: OrderedDict[bytes, OrderedDict[BackendId, float]] = field(default_factory=OrderedDict)

    def saw(self, prompt: Sequence[Beginning], backend: BackendId, now: float) -> None:
        """The backend has read this prompt.

        The whole of it is what the next turn begins with; its first message, the instructions, is
        what other conversations begin with.
        """
        for beginning in {prompt[0], prompt[-1]} if prompt else ():
            backends = self._seen.setdefault(beginning.digest, OrderedDict())
            self._seen.move_to_end(beginning.digest)
            backends[backend] = now
            backends.move_to_end(backend)
            if len(backends) > MAX_BACKENDS:
                backends.popitem(last=False)
            if len(self._seen) > MAX_PREFIXES:
                self._seen.popitem(last=False)

    def share(self, prompt: Sequence[Beginning], backend: BackendId, now: float) -> float:
        """The share of the prompt that the backend is expected to still hold, 0 to 1."""
        best = 0.0
        for beginning in prompt:
            backends = self._seen.get(beginning.digest)
            at = backends.get(backend) if backends else None
            if at is not None:
                best = max(best, beginning.share * 0.5 ** (max(now - at, 0.0) / HALF_LIFE))
        return best
