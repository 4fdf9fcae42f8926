"""What is noted of each request: the cache's statistics, and the ledger.

A request is counted at its end, as what it then is: whole, or unfinished where it failed or its
asker left. A failed attempt at one backend is neither, as long as another one answers.
"""

from __future__ import annotations

from typing import Self

from ..cache.uses import Kind, Uses
from ..mesh.transport import PeerId
from ..providers.base import (
    Answering,
    Asked,
    CacheStatus,
    Chunk,
    EmbedRequest,
    Origin,
    Usage,
    total_usage,
)
from .ledger import Counts, Ledger
from .replays import Replayed, cost

#: How an answer came, and what the statistics call that.
KINDS: dict[CacheStatus, Kind] = {
    "hit-local": "hits_local",
    "hit-mesh": "hits_mesh",
    "coalesced": "coalesced",
    "miss": "misses",
    "bypass": "bypassed",
}
#: Answers that were computed for who asked.
_COMPUTED: frozenset[CacheStatus] = frozenset({"miss", "bypass"})


class Accounts:
    """Notes how requests were answered."""

    def __init__(self, uses: Uses, ledger: Ledger, peer: PeerId) -> None:
        """`peer` is this node."""
        self.uses = uses
        self.ledger = ledger
        self.peer = peer

    def open(self, request: Asked) -> Account:
        """The account of one request, to be entered for as long as it takes."""
        return Account(self, request)


class Account:
    """One request, until it is over."""

    __slots__ = ("_accounts", "_asker", "_embed", "_origin", "_whole")

    def __init__(self, accounts: Accounts, request: Asked) -> None:
        self._accounts = accounts
        self._asker = request.asker
        #: Its inputs are counted in the statistics one by one, by who looked them up.
        self._embed = isinstance(request, EmbedRequest)
        self._origin = Origin()
        self._whole = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._whole:
            self._add(Counts(unfinished=1), cache="")

    def follow(self, answering: Answering, key: bytes) -> Answering:
        """The same answer, to the question of that key; it is noted when it has ended."""
        answering.key = key
        self._origin = answering.origin
        counted = not self._embed and not self._asker  # a peer counts its own requests
        if counted:
            self._accounts.uses.count(KINDS[answering.origin.cache])
        if isinstance(answering, Replayed):
            stored, usage = answering.stored, answering.stored.completion.usage
            saved = Counts(
                tokens_saved=usage.total_tokens,
                seconds_saved=stored.seconds or 0.0,
                money_saved=stored.money or 0.0,
            )
            self._end(usage, saved, counted)
            return answering
        answering.chunks = _Followed(self, answering, counted)
        return answering

    def ended(self, last: Chunk, counted: bool) -> None:
        """Its last chunk came."""
        if self._whole:
            return
        self._origin = last.origin or self._origin
        usage = last.usage or Usage()
        if last.embeddings:
            self._end(usage, self._saved_by_embeddings(last), counted)
        elif self._origin.cache in _COMPUTED:
            self._end(usage, self._cost(usage), counted)
        else:  # somebody else's work
            money = cost(self._origin.price, usage) or 0.0
            self._end(usage, Counts(tokens_saved=usage.total_tokens, money_saved=money), counted)

    def _saved_by_embeddings(self, last: Chunk) -> Counts:
        """Some inputs may have been stored; the others were computed together."""
        stored = total_usage(e.usage for e in last.embeddings if e.usage.cached)
        fresh = total_usage(e.usage for e in last.embeddings if not e.usage.cached)
        if self._origin.cache in _COMPUTED:
            counts = self._cost(fresh)
            counts.tokens_saved = stored.total_tokens
            return counts
        money = cost(self._origin.price, fresh) or 0.0
        return Counts(tokens_saved=stored.total_tokens + fresh.total_tokens, money_saved=money)

    def _cost(self, usage: Usage) -> Counts:
        """What computing it cost elsewhere; a provider of this node counts its own (`pricing`)."""
        if self._origin.peer == self._accounts.peer:
            return Counts()
        return Counts(money=cost(self._origin.price, usage) or 0.0)

    def _end(self, usage: Usage, counts: Counts, counted: bool) -> None:
        self._whole = True
        counts.requests = 1
        counts.prompt_tokens = usage.prompt_tokens
        counts.completion_tokens = usage.completion_tokens
        self._add(counts, cache=self._origin.cache)
        if counted:
            self._accounts.uses.saved(
                tokens=counts.tokens_saved,
                seconds=counts.seconds_saved,
                money=counts.money_saved,
            )

    def _add(self, counts: Counts, *, cache: str) -> None:
        origin = self._origin
        self._accounts.ledger.add(
            counts,
            asker=self._asker,
            peer=origin.peer,
            provider=origin.provider,
            model=origin.model,
            cache=cache,
        )


class _Followed:
    """Passes an answer on, and tells its account of the end."""

    __slots__ = ("_account", "_chunks", "_counted")

    def __init__(self, account: Account, answering: Answering, counted: bool) -> None:
        self._account = account
        self._chunks = aiter(answering.chunks)
        self._counted = counted

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        chunk = await anext(self._chunks)
        if chunk.finish_reason is not None:
            self._account.ended(chunk, self._counted)
        return chunk
