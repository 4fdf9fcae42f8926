"""One request's way through its candidates: who may be asked, who is next, when to give up. Pure.

A failure leads to the next candidate; after the first token only to such a one as can go on from
there (`continuing`). Each is asked at most once for a request. One that cannot be asked for a while
is looked at again each time that somebody is needed. Where nobody else is left, one whose failure
may pass is asked once more, or one whose obstacle is soon over, after a pause. What is asked beyond
a second candidate is inside a budget that all requests of the node share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, NamedTuple

from ..providers.base import (
    Asked,
    CacheOnlyMiss,
    ContentFiltered,
    ContextTooLong,
    DeadlineExceeded,
    Declined,
    GenerateError,
    GenerateRequest,
    ModelNotFound,
    ModelOffer,
    ProviderBusy,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
)
from .budget import Budget
from .continuing import SoFar, Way, way_of, way_on
from .ending import all_failed, listed, no_candidate
from .hedging import may_be_second, patience_with
from .ladder import spent_at, too_much
from .policies import Candidate
from .ruling_out import Obstacle, RuledOut, held_back

#: Share of the requests that may be sent once more or to a third candidate, how many that may be at
#: once, and how many a second whatever is asked.
RETRY_SHARE, MOST_RETRIES, RETRIES_A_SECOND = 0.2, 20.0, 0.2
#: Seconds until the same candidate is asked again, on average; the pauses of several requests lie
#: half of it to both sides.
PAUSE = 0.3
#: A caller waits no longer than this (s) for a candidate that failed or is held back: else it is
#: told when.
LONGEST_PAUSE = 1.5


#: As what a candidate is asked: in its turn; once more; as a second one, since the first token is
#: late; to go on where another one broke off.
Role = Literal["turn", "again", "hedge", "continue", "restart"]
#: How it went: `broke` after its first token, `outrun` by another that was asked at the same time.
Outcome = Literal["answered", "failed", "broke", "outrun"]


class Step(NamedTuple):
    """The candidate to ask, after a pause (s), and how it is to go on from what there is."""

    candidate: Candidate
    #: How many were asked with it.
    number: int
    pause: float = 0.0
    way: Way = "restart"
    role: Role = "turn"
    #: Whose answer it is to go on with, and after how many characters that broke off.
    after: Candidate | None = None
    at: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """A candidate that was asked, how that ended, and how long it took (s)."""

    step: Step
    error: GenerateError | None
    seconds: float
    outcome: Outcome

    @property
    def candidate(self) -> Candidate:
        return self.step.candidate

    def __str__(self) -> str:
        return f"{self.candidate}: {self.error or 'answered'}"


def retry_budget(now: float) -> Budget:
    """What all requests of a node have together for further attempts."""
    return Budget(RETRY_SHARE, most=MOST_RETRIES, a_second=RETRIES_A_SECOND, now=now)


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
        obstacle: Callable[[Candidate], Obstacle | None],
        budget: Budget,
        hedges: Budget | None = None,
        rng: Random,
        until: float = math.inf,
        for_peer: bool = False,
    ) -> None:
        """`obstacle` says what keeps a candidate from being asked now. `until` the caller waits.
        `hedges`: may another one be asked when a first token is late, and how many more?

        What a peer asks for is tried once: the peer decides what is next.
        """
        self.request = request
        #: Who could not be asked when the request came.
        self.ruled_out = ruled_out
        self.tried: list[Attempt] = []
        #: Who may still be asked.
        self.left = list(candidates)
        #: What the caller has of an answer that broke, and why it did.
        self.so_far: SoFar | None = None
        self._broke: StreamInterrupted | None = None
        #: Whose text that is.
        self._by: list[ModelOffer] = []
        self._broken: Candidate | None = None
        #: What attempts that came to nothing have cost (US dollars).
        self._spent = 0.0
        #: Tokens of what the caller has that are in there.
        self._paid_for = 0
        self._choose = choose
        self._models = models
        self._obstacle = obstacle
        self._budget = budget
        self._hedges = hedges
        self._asked = 0
        #: Who is being asked, and as what.
        self.under_way: dict[Candidate, Step] = {}
        self._rng = rng
        self._until = until
        self._for_peer = for_peer
        #: Was a pause made?
        self._paused = False
        #: Those that may be asked once their obstacle is over, and those that never may.
        self._held_back = [r for r in ruled_out if r.held_back]
        self._excluded = [r for r in ruled_out if not r.held_back]
        #: Why nobody further was asked.
        self._stopped = ""

    @property
    def may_go_on(self) -> bool:
        """If the answer breaks after its first token, is there anybody who could go on?"""
        request = self.request
        able = [*self.left, *(r.candidate for r in self._held_back)]
        return (
            len(able) > 1
            and isinstance(request, GenerateRequest)
            and any(way_of(request, (), c.offer) for c in able)
        )

    @property
    def may_hedge(self) -> bool:
        """May a second candidate be asked while the first one is?"""
        return self._hedges is not None and len(self.left) > 1

    @property
    def may_be_asked(self) -> list[Candidate]:
        """Those left that can give the answer, or go on from what there is of it.

        Among them are those that were held back, and are no longer.
        """
        free = [r.candidate for r in self._held_back if self._obstacle(r.candidate) is None]
        return [c for c in (*self.left, *free) if self._way(c)]

    @property
    def may_go_elsewhere(self) -> bool:
        """Is there another one that can be asked at once?"""
        return any(self._obstacle(c) is None for c in self.may_be_asked)

    def next(self, now: float) -> Step:
        """Whom to ask now. Raises the error that ends the request if there is nobody."""
        while left := self.may_be_asked:
            chosen = self._choose(left)
            self._take_out(chosen)
            obstacle = self._obstacle(chosen)
            if dear := self._too_much(chosen):
                self._excluded.append(RuledOut(chosen, dear, too_dear=True))
            elif obstacle is not None:
                self._held_back.append(held_back(chosen, obstacle))
            elif len(self.tried) < 2 or self._budget.take(now):
                return self._step(chosen)
            else:
                self._stopped = "too many requests were tried again lately"
                break
        else:
            if (step := self._after_a_pause(now)) is not None:
                return step
        raise self._end()

    def passed_over(self, step: Step, obstacle: Obstacle) -> None:
        """It cannot be asked after its pause, either."""
        del self.under_way[step.candidate]
        self._asked -= 1
        if all(a.candidate is not step.candidate for a in self.tried):
            self._held_back.append(held_back(step.candidate, obstacle))

    def failed(self, candidate: Candidate, error: GenerateError, seconds: float) -> None:
        """It failed before its first token. Raises the error where nobody else may be asked."""
        self._tried(candidate, error, seconds, "failed")
        if isinstance(error, DeadlineExceeded):  # it read the prompt, as far as anybody knows
            self._spent += spent_at(candidate, self.request, 0)
        if isinstance(error, ContextTooLong):
            self._keep_larger(candidate.offer.context_length or 0)
            if not self.left and not self._held_back:
                raise self._told(error)
        elif isinstance(error, ModelNotFound):
            pass  # what that peer offered was old news
        elif isinstance(error, ContentFiltered | CacheOnlyMiss):
            raise self._told(error)
        elif isinstance(error, RequestRejected) and self.so_far is None:
            raise error  # else it is the prefix that it does not take

    def answered(self, candidate: Candidate, seconds: float) -> None:
        """Its first token came."""
        self._tried(candidate, None, seconds, "answered")

    def broke(self, error: StreamInterrupted, seconds: float, so_far: SoFar) -> None:
        """The one that answered last broke off its answer."""
        answered = self.tried.pop()
        self.tried.append(replace(answered, error=error, seconds=seconds, outcome="broke"))
        self._by.append(answered.candidate.offer)
        tokens = so_far.tokens - self._paid_for
        self._spent += spent_at(answered.candidate, self.request, max(tokens, 0))
        self._paid_for = so_far.tokens
        self._broken = answered.candidate
        self.so_far = so_far
        self._broke = self._broke or error

    def differed(self, error: GenerateError, seconds: float) -> GenerateError:
        """The one that went on gave something else. Returns the error that ends the request."""
        answered = self.tried.pop()
        self.tried.append(replace(answered, error=error, seconds=seconds, outcome="failed"))
        return self._told(error)

    def _keep_larger(self, size: int) -> None:
        """Nobody else with a context of that size or less is of use."""
        self.left = [c for c in self.left if (c.offer.context_length or 0) > size]
        self._held_back = [
            r for r in self._held_back if (r.candidate.offer.context_length or 0) > size
        ]

    def _too_much(self, candidate: Candidate) -> str:
        return too_much(candidate, self.request, self._spent)

    def _take_out(self, chosen: Candidate) -> None:
        """It is its turn."""
        self.left = [c for c in self.left if c is not chosen]
        self._held_back = [r for r in self._held_back if r.candidate is not chosen]

    def _way(self, candidate: Candidate) -> Way | None:
        request = self.request
        if self.so_far is None or not isinstance(request, GenerateRequest):
            return "restart"
        return way_on(request, self._by, candidate.offer, self.so_far)

    def _step(self, candidate: Candidate, pause: float = 0.0, role: Role = "turn") -> Step:
        self._asked += 1
        step = Step(candidate, self._asked, pause, role=role)
        if self.so_far is not None:
            way = self._way(candidate) or "restart"
            at = len(self.so_far.text)
            step = step._replace(way=way, role=way, after=self._broken, at=at)
        self.under_way[candidate] = step
        return step

    def _tried(
        self, candidate: Candidate, error: GenerateError | None, seconds: float, outcome: Outcome
    ) -> None:
        step = self.under_way.pop(candidate, None) or Step(candidate, self._asked)
        self.tried.append(Attempt(step, error, seconds, outcome))

    # --- two at once

    def patience(self, step: Step) -> float | None:
        """Seconds after which a second one may be asked; None: none may."""
        if self._hedges is None or self.so_far is not None:
            return None
        return patience_with(step.candidate)

    def second(self, now: float) -> Step | None:
        """Whom to ask as well, if there is anybody and the budget allows it."""
        left = [c for c in may_be_second(self.left) if self._obstacle(c) is None]
        if not left or self._hedges is None or not self._hedges.take(now):
            return None
        chosen = self._choose(left)
        self._take_out(chosen)
        return self._step(chosen, role="hedge")

    def outrun(self, candidate: Candidate, by: Candidate, seconds: float) -> None:
        """The other one was faster. It has not failed, and may be asked again if need be."""
        error = GenerateError(f"{by} was faster, and it was cancelled")
        self._tried(candidate, error, seconds, "outrun")
        self.left.append(candidate)

    # --- after a pause

    def _after_a_pause(self, now: float) -> Step | None:
        """The candidate that may be asked first of those that failed or are held back.

        Only once for a request, and not before anybody was asked: what has cost nobody anything
        ends at once, and its caller is told when to come back.
        """
        if self._paused or self._for_peer or not self.tried:
            return None
        pauses = self._pauses()
        candidate = min(pauses, key=pauses.__getitem__, default=None)
        if candidate is None or pauses[candidate] > min(LONGEST_PAUSE, self._until - now):
            return None
        if not self._budget.take(now):
            self._stopped = "too many requests were tried again lately"
            return None
        self._paused = True
        self._take_out(candidate)
        failed = any(a.candidate is candidate for a in self.tried)
        return self._step(candidate, pauses[candidate], "again" if failed else "turn")

    def _pauses(self) -> dict[Candidate, float]:
        """Seconds until each may be asked that failed and may not do so again, or is held back."""
        said = {
            a.candidate: a.error.retry_after
            for a in self.tried
            if a.error is not None and _may_pass(a.error)
        }
        said |= {r.candidate: None for r in self._held_back}
        return {
            c: self._pause(c, wait)
            for c, wait in said.items()
            if self._way(c) and not self._too_much(c)
        }

    def _pause(self, candidate: Candidate, retry_after: float | None) -> float:
        """Seconds until it may be asked, as it said itself and as its obstacle says."""
        obstacle = self._obstacle(candidate)
        jittered = PAUSE * self._rng.uniform(0.5, 1.5)
        return max(jittered, retry_after or 0.0, obstacle.wait if obstacle else 0.0)

    # --- what is said at the end

    def _end(self) -> GenerateError:
        if self._broke is not None:
            return self._told()
        model, out = self.request.model, (*self._excluded, *self._held_back)
        if self.tried:
            return all_failed(model, self.tried, out, self._stopped, for_peer=self._for_peer)
        return no_candidate(model, out, self._models, for_peer=self._for_peer)

    def _told(self, error: GenerateError | None = None) -> GenerateError:
        """The error for the caller, which hides no earlier failure of an answer that had begun."""
        if self._broke is None or self.so_far is None:
            assert error is not None
            return error
        later = [str(a) for a in self.tried if a.error is not self._broke]
        later += [str(r) for r in (*self._excluded, *self._held_back) if not r.pinned]
        why = self._stopped or "nobody can go on from there"
        reasons = [self._broke.message, *([listed(later, "; ")] if later else [])]
        return StreamInterrupted(
            "; ".join([*reasons, *([] if error else [why])]),
            partial=self.so_far.text,
            retry_after=self._broke.retry_after,
        )


def _may_pass(error: GenerateError) -> bool:
    """Is the same candidate worth another try? Not where it was silent, full, or said no."""
    if isinstance(error, ProviderBusy | Declined | DeadlineExceeded):
        return False
    told = isinstance(error, ProviderUnavailable) and error.retry_after is not None
    return error.again or told
