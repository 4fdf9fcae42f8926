"""Whose claims count, and which answer they speak for.

A claim counts for an answer if its signer computed it and is trusted: a member whom the policy
names and who did not lose its say. Different answers to one key are alternatives and no lies, as
kernels and batches differ. They are ordered by how many trusted producers claim them, then by age,
the newest first; this node's own answers come before all of them, and are not found here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .claim_rows import Claim
from .conduct import OFFENCES, Conduct

#: What `cache.trust` may say beside the names of peers: every member; nobody but this node.
ALL, ME = "all", "me"


class Alternative(NamedTuple):
    """An answer that peers claim to one key. Times in seconds since 1970."""

    cid: bytes
    #: Who computed it and is trusted.
    producers: tuple[str, ...]
    #: Who may have its bytes: the producers, and who holds a copy. All of them have a say.
    sources: tuple[str, ...]
    #: When it was computed, and until when somebody trusted claims it.
    made_at: int
    expires_at: int


class Trust:
    """The policy of this node (`cache.trust`, `cache.min_agreement`) and what peers made of it."""

    def __init__(
        self,
        conduct: Conduct,
        *,
        own: str,
        trusted: Sequence[str] = (ALL,),
        min_agreement: int = 1,
        name_of: Callable[[str], str] = lambda peer: "",
        allowed: Callable[[str], bool] = lambda peer: True,
    ) -> None:
        """`own` is this node; `name_of` gives the name of a peer's node, if no other has it.

        What a peer claims that is not `allowed` counts for nothing, and nothing is fetched of it.
        """
        self._allowed = allowed
        self.min_agreement = min_agreement
        self._conduct = conduct
        self._own = own
        self._all = ALL in trusted
        self._listed = frozenset(trusted) - {ALL, ME}
        self._name_of = name_of

    def doubt(self, peer: str, now: float) -> str:
        """Why that peer's claims do not count; "" if they do."""
        if peer == self._own:
            return ""
        if not self._allowed(peer):
            return "it may not share answers with this node (`promptmesh peers allow`)"
        silence = self._conduct.silence(peer, now)
        if silence is not None:
            return f"{OFFENCES[silence.offence].name}; no say {_until(silence.until)}"
        if self._all or peer in self._listed or self._name_of(peer) in self._listed:
            return ""
        if not self._listed:
            return "only this node's own answers are trusted (cache.trust)"
        return "it is not among the trusted peers (cache.trust)"

    def alternatives(
        self, claims: Iterable[Claim], now: float, *, wanted: int | None = None
    ) -> list[Alternative]:
        """The answers that enough trusted producers claim, best first.

        `wanted` is how many; None: as many as the configuration wants.
        """
        by_cid: dict[bytes, list[Claim]] = {}
        for claim in claims:
            if self._allowed(claim.peer) and self._conduct.silence(claim.peer, now) is None:
                by_cid.setdefault(claim.cid, []).append(claim)
        enough = max(1, self.min_agreement if wanted is None else wanted)
        found = [
            alternative
            for cid, same in by_cid.items()
            if len((alternative := self._alternative(cid, same, now)).producers) >= enough
        ]
        return sorted(found, key=lambda a: (-len(a.producers), -a.made_at, a.cid))

    def _alternative(self, cid: bytes, same: Sequence[Claim], now: float) -> Alternative:
        counting = [c for c in same if not c.held and not self.doubt(c.peer, now)]
        return Alternative(
            cid,
            producers=tuple(claim.peer for claim in counting),
            sources=tuple(claim.peer for claim in sorted(same, key=lambda c: c.held)),
            made_at=max((claim.made_at for claim in counting), default=0),
            expires_at=max((claim.expires_at for claim in counting), default=0),
        )

    def objection(
        self, source: str, claims: Callable[[], Iterable[Claim]], now: float, *, wanted: int | None
    ) -> str:
        """Why an answer that lies here and that `source` computed may not be given; "": it may.

        `claims` gives the claims to its CID; nothing is looked up where the answer is clear.
        """
        if source == self._own:
            return ""
        enough = max(1, self.min_agreement if wanted is None else wanted)
        doubt = self.doubt(source, now)
        if not doubt and enough == 1:
            return ""
        # Its source may have had it from somebody else, so only claims tell who computed it.
        producers = {claim.peer for claim in claims() if not claim.held}
        count = sum(not self.doubt(peer, now) for peer in producers)
        if count >= enough:
            return ""
        if enough == 1:
            return doubt
        return f"{enough} trusted nodes must have computed it (min_agreement), and {count} did"


def _until(when: float) -> str:
    if math.isinf(when):
        return "for good"
    return time.strftime("until %Y-%m-%d %H:%M:%S UTC", time.gmtime(when))
