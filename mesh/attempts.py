"""One request's way through its candidates: who may be asked, who is next, when to give up. Pure.

Each candidate is asked at most once for a request. Before the first token a failure leads to the
next candidate; after it the answer has begun and the failure is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..providers.base import (
    Asked,
    CacheOnlyMiss,
    ContextTooLong,
    DeadlineExceeded,
    GenerateError,
    GenerateRequest,
    Image,
    Input,
    ModelNotFound,
    ProviderBusy,
    ProviderUnavailable,
    RequestRejected,
    Task,
)
from .ladder import refusal
from .policies import Candidate

#: No tokenizer makes fewer tokens of a text than one for so many characters, near enough; a prompt
#: is ruled out by its length only where that is certain, else the provider says it.
MOST_CHARACTERS_A_TOKEN = 8
#: Names of models, and candidates with their reasons, that an error lists.
MOST_LISTED = 20
#: What to say of a model that is not for the task.
_NOT_FOR: dict[Task, str] = {
    "generate": "it is not for chats: it makes embeddings",
    "embed": "it makes no embeddings",
}


class Obstacle(NamedTuple):
    """Why a candidate cannot be asked now: not connected, starting, its breaker is open."""

    reason: str
    #: Seconds after which it may be worth another try.
    wait: float = 1.0


class RuledOut(NamedTuple):
    """A candidate that may not or cannot answer this request, and why."""

    candidate: Candidate
    reason: str
    #: It passes: seconds after which another try may succeed.
    wait: float | None = None
    #: The request names another provider or peer.
    pinned: bool = False
    too_long: bool = False
    #: It costs more than the request may.
    too_dear: bool = False

    def __str__(self) -> str:
        return f"{self.candidate}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Attempt:
    """A candidate that was asked, how that ended, and how long it took (s)."""

    candidate: Candidate
    error: GenerateError | None
    seconds: float

    def __str__(self) -> str:
        return f"{self.candidate}: {self.error or 'answered'}"


def rule_out(candidate: Candidate, request: Asked, obstacle: Obstacle | None) -> RuledOut | None:
    """Why this candidate is none for this request; None if it is one."""
    offer = candidate.offer
    if request.peer is not None and request.peer not in (candidate.peer, candidate.node):
        return RuledOut(candidate, f"the request is for peer {request.peer}", pinned=True)
    if request.provider is not None and request.provider != candidate.provider:
        return RuledOut(candidate, f"the request is for provider {request.provider}", pinned=True)
    if (
        reason := candidate.forbidden
        or _privacy(candidate, request)
        or _ability(candidate, request)
    ):
        return RuledOut(candidate, reason)
    if (refused := refusal(candidate, request)) is not None:
        wait = refused.wait
        return RuledOut(candidate, refused.reason, wait=wait, too_dear=wait is None)
    if offer.context_length is not None and _least_tokens(request) > offer.context_length:
        reason = f"the prompt does not fit into its {offer.context_length} tokens"
        return RuledOut(candidate, reason, too_long=True)
    if obstacle is not None:
        return RuledOut(candidate, obstacle.reason, wait=obstacle.wait)
    return None


def _privacy(candidate: Candidate, request: Asked) -> str:
    if request.privacy == "local" and not candidate.own:
        return "privacy is `local`, and it is another machine"
    if request.privacy != "any" and candidate.offer.egress:
        return f"privacy is `{request.privacy}`, and it sends prompts to a third party"
    return ""


def _ability(candidate: Candidate, request: Asked) -> str:
    offer = candidate.offer
    if request.task not in offer.tasks:
        return _NOT_FOR[request.task]
    if not isinstance(request, GenerateRequest):
        return ""
    if request.tools and not offer.tools:
        return "it cannot call tools"
    if "image" not in offer.modalities and _has_images(request):
        return "it cannot see images"
    if request.prefix and not offer.can_continue:
        return "it cannot continue a text"
    return ""


def _has_images(request: GenerateRequest) -> bool:
    return any(isinstance(part, Image) for m in request.messages for part in m.content)


def _least_tokens(request: Asked) -> int:
    if not isinstance(request, GenerateRequest):
        return max(_least_tokens_of(given) for given in request.inputs)
    characters = sum(len(m.text) for m in request.messages) + len(request.prefix)
    return characters // MOST_CHARACTERS_A_TOKEN


def _least_tokens_of(given: Input) -> int:
    return len(given) // MOST_CHARACTERS_A_TOKEN if isinstance(given, str) else len(given)


class Attempts:
    """Decides who is asked next, for one request."""

    def __init__(
        self,
        request: Asked,
        candidates: Sequence[Candidate],
        ruled_out: Sequence[RuledOut],
        *,
        choose: Callable[[Sequence[Candidate]], Candidate],
        models: Callable[[], Iterable[str]],
        for_peer: bool = False,
    ) -> None:
        self.request = request
        self.ruled_out = ruled_out
        self.tried: list[Attempt] = []
        #: Who may still be asked.
        self.left = list(candidates)
        self._choose = choose
        self._models = models
        self._for_peer = for_peer

    def next(self) -> Candidate:
        """The candidate to ask now. Raises the error that ends the request if there is none."""
        if not self.left:
            raise self._all_failed() if self.tried else self._no_candidate()
        chosen = self._choose(self.left)
        self.left.remove(chosen)
        return chosen

    def failed(self, candidate: Candidate, error: GenerateError, seconds: float) -> None:
        """It failed before its first token. Raises `error` where nobody else may be asked."""
        self.tried.append(Attempt(candidate, error, seconds))
        if isinstance(error, ContextTooLong):
            size = candidate.offer.context_length or 0
            self.left = [c for c in self.left if (c.offer.context_length or 0) > size]
            if not self.left:
                raise error
        elif isinstance(error, ModelNotFound):
            pass  # what that peer offered was old news
        elif isinstance(error, RequestRejected | CacheOnlyMiss):
            raise error

    def answered(self, candidate: Candidate, seconds: float) -> None:
        """Its first token came."""
        self.tried.append(Attempt(candidate, None, seconds))

    def _all_failed(self) -> GenerateError:
        errors = [a.error for a in self.tried if a.error is not None]
        reasons = [str(a) for a in self.tried]
        reasons += [str(r) for r in self.ruled_out if not r.pinned]
        message = f"every candidate for `{self.request.model}` failed: {_listed(reasons, '; ')}"
        if all(isinstance(e, ModelNotFound) for e in errors):
            return ModelNotFound(message, field="model")
        waits = [e.retry_after for e in errors if e.retry_after is not None]
        kind: type[GenerateError] = ProviderUnavailable
        for same in (ProviderBusy, DeadlineExceeded):
            if all(isinstance(e, same) for e in errors):
                kind = same
        return kind(message, retry_after=min(waits, default=None))

    def _no_candidate(self) -> GenerateError:
        model = self.request.model
        if not self.ruled_out:
            models = sorted(set(self._models()))
            there = f"there are: {_listed(models, ', ')}" if models else "there is no model at all"
            return ModelNotFound(f"nobody offers the model `{model}`; {there}", field="model")
        reasons = [r for r in self.ruled_out if not r.pinned] or list(self.ruled_out)
        text = _listed([str(r) for r in reasons], "; ")
        message = f"nobody can answer with `{model}` now: {text}"
        waits = [r.wait for r in reasons if r.wait is not None]
        if waits:
            return ProviderUnavailable(message, retry_after=min(waits))
        message = f"nobody may answer this with `{model}`: {text}"
        if reasons[0].pinned:
            return ModelNotFound(message, field="model")
        if self._for_peer:
            # To the peer that asks this is a candidate like another: it tries the next.
            return ProviderUnavailable(message)
        if all(r.too_long for r in reasons):
            return ContextTooLong(message, field="messages")
        if all(r.too_dear for r in reasons):
            return RequestRejected(message, field="promptmesh.max_cost")
        return RequestRejected(message)


def _listed(items: Sequence[str], separator: str) -> str:
    more = len(items) - MOST_LISTED
    text = separator.join(items[:MOST_LISTED])
    return f"{text} and {more} more" if more > 0 else text
