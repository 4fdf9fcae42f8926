"""How a request went among its candidates: for people who ask why.

What the choice knew anyway is kept as it is; it is put into words only when somebody asks. Nothing
here keeps a prompt or an answer alive, which the errors of failed attempts would by their frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from ..providers.base import Chunk, FinishReason, Policy, Usage
from .attempts import Attempt, Outcome, Role, Step
from .policies import Candidate, Decision
from .ruling_out import RuledOut

#: Characters of an error that are kept.
MAX_ERROR = 2000


class Tried(NamedTuple):
    """A candidate that was asked, how that ended (`""`: it answered), and after how long (s)."""

    candidate: Candidate
    error: str
    code: str
    seconds: float
    #: As what it was asked, and how it went.
    role: Role = "turn"
    outcome: Outcome = "answered"
    #: Whose answer it went on with, and after how many characters.
    after: Candidate | None = None
    at: int = 0

    def __str__(self) -> str:
        return f"{self.candidate}: {self.error or 'answered'}"


class Route:
    """The policy that ran, who could be asked and who not, the choices, and the attempts."""

    def __init__(
        self,
        policy: Policy,
        candidates: Sequence[Candidate],
        ruled_out: Sequence[RuledOut],
        decisions: Sequence[Decision],
        attempts: Sequence[Attempt],
        under_way: Mapping[Candidate, Step] = MappingProxyType({}),
    ) -> None:
        """The decisions and attempts are added to while the request goes on.

        `under_way`: who is being asked, and has not begun to answer.
        """
        self.policy = policy
        self.candidates = candidates
        self.ruled_out = ruled_out
        self.decisions = decisions
        #: When the first token came.
        self.first_at: float | None = None
        self.usage: Usage | None = None
        self.finish_reason: FinishReason | None = None
        self.attempts = attempts
        self.under_way = under_way
        #: Is told when nothing is added any more.
        self.on_settled: Callable[[Route], None] | None = None
        self._tried: Sequence[Tried] | None = None

    @property
    def tried(self) -> Sequence[Tried]:
        """The attempts so far."""
        return [_told(a) for a in self.attempts] if self._tried is None else self._tried

    def finished(self, last: Chunk) -> None:
        """The answer is whole."""
        self.usage, self.finish_reason = last.usage, last.finish_reason

    def settle(self) -> None:
        """The request has ended: nothing is added any more."""
        self._tried, self.attempts, self.under_way = self.tried, (), {}
        if self.on_settled is not None:
            self.on_settled(self)


def _told(attempt: Attempt) -> Tried:
    error = attempt.error
    said, code = ("", "") if error is None else (str(error)[:MAX_ERROR], error.code)
    step = attempt.step
    return Tried(
        step.candidate,
        said,
        code,
        attempt.seconds,
        step.role,
        attempt.outcome,
        step.after,
        step.at,
    )
