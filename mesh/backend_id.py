"""What a request is sent to: a provider of a node, and a model there."""

from __future__ import annotations

from typing import NamedTuple

from .transport import PeerId


class BackendId(NamedTuple):
    """A provider of a node."""

    peer: PeerId
    provider: str


class Measured(NamedTuple):
    """A model at a provider of a node."""

    peer: PeerId
    provider: str
    model: str
