"""Who may be asked at all: a request's model, task, privacy, abilities and money. Pure."""

from __future__ import annotations

from typing import NamedTuple

from ..providers.base import (
    Asked,
    GenerateRequest,
    Image,
    ModelOffer,
    ModelRequest,
    Task,
)
from ..providers.tokens import least_tokens
from .ladder import refusal
from .policies import Candidate

#: What to say of a model that is not for the task.
_NOT_FOR: dict[Task, str] = {
    "generate": "it is not for chats: it makes embeddings",
    "embed": "it makes no embeddings",
}


class Obstacle(NamedTuple):
    """Why a candidate cannot be asked now: not connected, starting, its breaker is open."""

    reason: str
    #: Seconds after which it may be worth another try.
    wait: float
    #: It works, and refused such a request.
    refused: bool = False


class RuledOut(NamedTuple):
    """A candidate that may not or cannot answer this request, and why."""

    candidate: Candidate
    reason: str
    #: It passes: seconds after which another try may succeed.
    wait: float | None = None
    #: The request names another provider or peer.
    pinned: bool = False
    too_long: bool = False
    #: It costs more than the request may, or than is left today.
    too_dear: bool = False
    #: It works, and refused such a request.
    refused: bool = False

    def __str__(self) -> str:
        return f"{self.candidate}: {self.reason}"

    @property
    def held_back(self) -> bool:
        """Could it answer, but for an obstacle that may be over while the request goes on?"""
        return self.wait is not None and not self.too_dear


def rule_out(candidate: Candidate, request: Asked, obstacle: Obstacle | None) -> RuledOut | None:
    """Why this candidate is none for this request; None if it is one."""
    offer = candidate.offer
    if request.peer is not None and request.peer not in (candidate.peer, candidate.node):
        return RuledOut(candidate, f"the request is for peer {request.peer}", pinned=True)
    if request.provider is not None and request.provider != candidate.provider:
        return RuledOut(candidate, f"the request is for provider {request.provider}", pinned=True)
    if (
        reason := candidate.forbidden
        or exposes(offer, request, own=candidate.own)
        or _lacks(offer, request)
    ):
        return RuledOut(candidate, reason)
    if (refused := refusal(candidate, request)) is not None:
        return RuledOut(candidate, refused.reason, wait=refused.wait, too_dear=True)
    if reason := _too_short(offer, request):
        return RuledOut(candidate, reason, too_long=True)
    if obstacle is not None:
        return held_back(candidate, obstacle)
    return None


def held_back(candidate: Candidate, obstacle: Obstacle) -> RuledOut:
    """The candidate could, and cannot be asked now."""
    return RuledOut(candidate, obstacle.reason, wait=obstacle.wait, refused=obstacle.refused)


def exposes(offer: ModelOffer, request: ModelRequest, *, own: bool) -> str:
    """Why its privacy does not let the prompt go there; "": it does."""
    if request.privacy == "local" and not own:
        return "privacy is `local`, and it is another machine"
    if request.privacy != "any" and offer.egress:
        return f"privacy is `{request.privacy}`, and it sends prompts to a third party"
    return ""


def unfit(offer: ModelOffer, request: ModelRequest) -> str:
    """Why the model cannot do what is asked; "": it can, as far as that is known beforehand."""
    return _lacks(offer, request) or _too_short(offer, request)


def _lacks(offer: ModelOffer, request: ModelRequest) -> str:
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


def _too_short(offer: ModelOffer, request: ModelRequest) -> str:
    # Only where that is certain; else the provider says it.
    if offer.context_length is None or least_tokens(request) <= offer.context_length:
        return ""
    return f"the prompt does not fit into its {offer.context_length} tokens"


def _has_images(request: GenerateRequest) -> bool:
    return any(isinstance(part, Image) for m in request.messages for part in m.content)
