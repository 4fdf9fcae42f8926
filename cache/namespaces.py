"""The namespaces of the mesh that this node is in: their secrets, and what they are called.

Everything comes from the mesh secret and the namespace's name, so whoever knows both has the same.
The mesh secret changes when the node joins another mesh.
"""

from __future__ import annotations

from dataclasses import dataclass

from .keys import namespace_secret, namespace_tag

#: Namespaces that are remembered: making one costs more than a key.
MAX_NAMESPACES = 256


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace in the present mesh."""

    secret: bytes
    #: Names it to who knows the secret, and to nobody else.
    tag: bytes


class Namespaces:
    """The namespaces of the present mesh, by name."""

    def __init__(self) -> None:
        self._swarm_key: bytes | None = None
        self._known: dict[str, Namespace] = {}

    def enter(self, swarm_key: bytes) -> None:
        """This node is in the mesh of that secret from now on."""
        self._swarm_key = swarm_key
        self._known.clear()

    def of(self, name: str) -> Namespace | None:
        """The namespace of that name; None while the node was in no mesh yet."""
        if self._swarm_key is None:
            return None
        found = self._known.get(name)
        if found is None:
            if len(self._known) >= MAX_NAMESPACES:
                self._known.clear()
            secret = namespace_secret(self._swarm_key, name)
            found = self._known[name] = Namespace(secret, namespace_tag(secret))
        return found
