"""The error that ends a request which nobody answered: who was asked and who not, and why. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from ..providers.base import (
    ContextTooLong,
    DeadlineExceeded,
    Declined,
    GenerateError,
    ModelNotFound,
    ProviderBusy,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
)
from .ruling_out import RuledOut

#: Names of models, and candidates with their reasons, that an error lists.
MOST_LISTED = 20


class Failure(Protocol):
    """A candidate that was asked (`attempts.Attempt`); its text names both it and the error."""

    @property
    def error(self) -> GenerateError | None: ...


def all_failed(
    model: str,
    tried: Sequence[Failure],
    not_asked: Sequence[RuledOut],
    stopped: str,
    *,
    for_peer: bool,
) -> GenerateError:
    """Those that were asked came to nothing. `stopped`: why nobody further was."""
    errors = [a.error for a in tried if a.error is not None]
    reasons = [str(a) for a in tried]
    reasons += [str(r) for r in not_asked if not r.pinned]
    reasons += [stopped] if stopped else []
    message = f"every candidate for `{model}` failed: {listed(reasons, '; ')}"
    if all(isinstance(e, ModelNotFound) for e in errors):
        return ModelNotFound(message, field="model")
    waits = [e.retry_after for e in errors if e.retry_after is not None]
    waits += [r.wait for r in not_asked if r.held_back and r.wait is not None]
    kind: type[GenerateError] = ProviderUnavailable
    told = (ProviderRefused,) if for_peer else ()
    for same in (ProviderBusy, DeadlineExceeded, *told):
        if all(isinstance(e, same) for e in errors):
            kind = same
    again = any(e.again for e in errors)
    return kind(message, retry_after=min(waits, default=None), again=again)


def no_candidate(
    model: str,
    ruled_out: Sequence[RuledOut],
    models: Callable[[], Iterable[str]],
    *,
    for_peer: bool,
) -> GenerateError:
    """Nobody could be asked. `models` are those that there are."""
    reasons = [r for r in ruled_out if not r.pinned] or ruled_out
    if not reasons:
        names = sorted(set(models()))
        there = f"there are: {listed(names, ', ')}" if names else "there is no model at all"
        return ModelNotFound(f"nobody offers the model `{model}`; {there}", field="model")
    text = listed([str(r) for r in reasons], "; ")
    waits = [r.wait for r in reasons if r.wait is not None]
    if waits or (for_peer and all(r.too_dear or r.refused for r in reasons)):
        message = f"nobody can answer with `{model}` now: {text}"
        return _for_now(reasons, for_peer=for_peer)(message, retry_after=min(waits, default=None))
    message = f"nobody may answer this with `{model}`: {text}"
    if reasons[0].pinned:
        return ModelNotFound(message, field="model")
    if for_peer:
        # To the peer that asks this is a candidate like another: it tries the next.
        return ProviderUnavailable(message)
    if all(r.too_long for r in reasons):
        return ContextTooLong(message, field="messages")
    if all(r.too_dear for r in reasons):
        return RequestRejected(message, field="promptmesh.max_cost")
    return RequestRejected(message)


def _for_now(reasons: Sequence[RuledOut], *, for_peer: bool) -> type[GenerateError]:
    if for_peer and all(r.too_dear for r in reasons):
        return Declined
    if for_peer and all(r.refused for r in reasons):
        return ProviderRefused
    return ProviderUnavailable


def listed(items: Sequence[str], separator: str) -> str:
    """The first of them, and how many more there are."""
    more = len(items) - MOST_LISTED
    text = separator.join(items[:MOST_LISTED])
    return f"{text} and {more} more" if more > 0 else text
