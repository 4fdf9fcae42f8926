"""What a person's model name means: `MODEL`, `PROVIDER/MODEL`, `PEER:PROVIDER/MODEL`, `auto`.

A model's own id may hold slashes and colons (`org/model`, `llama3:8b`), so a name is first looked
for as it stands, and taken apart only if nobody offers it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from ..mesh.candidates import Source
from ..providers.base import ModelRequest, Prefer
from .auto import choose

AUTO = "auto"

_Request = TypeVar("_Request", bound=ModelRequest)


class Names:
    """Resolves model names against what is offered now, by this node and its peers."""

    def __init__(
        self,
        sources: Callable[[], Iterable[Source]],
        *,
        prefer: Prefer = "free",
        is_paused: Callable[[Source], bool] = lambda source: False,
    ) -> None:
        self._sources = sources
        self._prefer: Prefer = prefer
        self._is_paused = is_paused

    def models(self) -> Mapping[str, Sequence[Source]]:
        """Each model id with who offers it, sorted by id, this node's own first."""
        found: dict[str, list[Source]] = {}
        for source in self._sources():
            found.setdefault(source.offer.id, []).append(source)
        return {
            model: sorted(found[model], key=lambda s: (not s.own, s.node, s.provider))
            for model in sorted(found)
        }

    def resolve(
        self, request: _Request, tell: Callable[[str], None] = lambda why: None
    ) -> _Request:
        """The request with a plain model id, and with the provider and peer its name pinned.

        `tell` is told why it is that model, where `auto` chose it.

        A name that nobody offers is left as it is: who chooses says what there is. Raises
        `ModelNotFound` for `auto` where there is no model at all.
        """
        name = request.model
        if name == AUTO:
            sources = list(self._sources())
            chosen = choose(sources, request, prefer=self._prefer, is_paused=self._is_paused)
            tell(chosen.why)
            return msgspec.structs.replace(request, model=chosen.model)
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
