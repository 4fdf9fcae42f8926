"""What a person's model name means: `MODEL`, `PROVIDER/MODEL`, `PEER:PROVIDER/MODEL`, `auto`.

A model's own id may hold slashes and colons (`org/model`, `llama3:8b`), so a name is first looked
for as it stands, and taken apart only if nobody offers it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from ..mesh.candidates import Source
from ..providers.base import ModelNotFound, ModelRequest

AUTO = "auto"

_Request = TypeVar("_Request", bound=ModelRequest)


class Names:
    """Resolves model names against what is offered now, by this node and its peers."""

    def __init__(self, sources: Callable[[], Iterable[Source]]) -> None:
        self._sources = sources

    def models(self) -> Mapping[str, Sequence[Source]]:
        """Each model id with who offers it, sorted by id, this node's own first."""
        found: dict[str, list[Source]] = {}
        for source in self._sources():
            found.setdefault(source.offer.id, []).append(source)
        return {
            model: sorted(found[model], key=lambda s: (not s.own, s.node, s.provider))
            for model in sorted(found)
        }

    def resolve(self, request: _Request) -> _Request:
        """The request with a plain model id, and with the provider and peer its name pinned.

        A name that nobody offers is left as it is: who chooses says what there is. Raises
        `ModelNotFound` for `auto` where there is no model at all.
        """
        name = request.model
        if name == AUTO:
            model = self._best(list(self._sources()), request)
            return msgspec.structs.replace(request, model=model)
        if any(source.offer.id == name for source in self._sources()):
            return request
        for source in self._sources():
            for pinned in _spellings(source):
                if pinned.name == name:
                    return msgspec.structs.replace(
                        request,
                        model=source.offer.id,
                        provider=request.provider or pinned.provider,
                        peer=request.peer or pinned.peer,
                    )
        return request

    def _best(self, sources: Sequence[Source], request: ModelRequest) -> str:
        """The model `auto` stands for: own before peers', free before paid; echo is the last.

        What is unavailable just now is taken only where there is nothing else.
        """
        sources = [source for source in sources if request.task in source.offer.tasks]
        usable = [
            source
            for source in sources
            if (request.provider in (None, source.provider))
            and (request.peer in (None, source.peer, source.node))
            and (request.privacy == "any" or not source.offer.egress)
            and (request.privacy != "local" or source.own)
        ]
        if not usable:
            raise ModelNotFound(_nothing(sources, request), field="model")
        return min(usable, key=_rank).offer.id


def _rank(source: Source) -> tuple[bool, bool, bool, bool, str]:
    """Sorts what `auto` may stand for, the best first."""
    offer = source.offer
    return not source.available, source.kind == "echo", offer.egress, not source.own, offer.id


def _nothing(sources: Sequence[Source], request: ModelRequest) -> str:
    """Why `auto` stands for no model, and what to do."""
    if not sources:
        what = "no model makes embeddings" if request.task == "embed" else "no model can be asked"
        return f"{what}: configure a provider, or join a mesh that has one"
    wanted = {
        "provider": request.provider,
        "peer": request.peer,
        "privacy": None if request.privacy == "any" else request.privacy,
    }
    asked = " and ".join(f"{name} `{value}`" for name, value in wanted.items() if value)
    there = sorted({f"{source.node or source.peer}:{source.provider}" for source in sources})
    return f"no model is offered with {asked}; there is {', '.join(there[:20])}"


class _Spelling(NamedTuple):
    name: str
    provider: str | None
    peer: str | None


def _spellings(source: Source) -> Iterable[_Spelling]:
    """The longer names of a model."""
    model, provider = source.offer.id, source.provider
    yield _Spelling(f"{provider}/{model}", provider, None)
    for peer in (source.node, source.peer):
        yield _Spelling(f"{peer}:{provider}/{model}", provider, source.peer)
        yield _Spelling(f"{peer}:{model}", None, source.peer)
