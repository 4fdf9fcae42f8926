"""One request: its key, a flight it can share, a stored answer, a backend, and the store again.

The router does not know whether an answer is made here or by a peer: `BackendManager` is a provider
like any other. The same `Router.open` serves this machine's programs and, with `local_only`, the
peers' requests, so that who computes also stores and signs.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Literal, NamedTuple, Protocol, TypeVar

import msgspec
import trio

from ..cache.answer_rows import StoredAnswer
from ..cache.answers import AnswerCache
from ..cache.keys import request_key
from ..cache.records import kind_for
from ..providers.base import (
    Answering,
    Asked,
    CacheControl,
    CacheOnlyMiss,
    CacheStatus,
    DeadlineExceeded,
    GenerateRequest,
    ModelRequest,
    Origin,
)
from .accounts import Account, Accounts
from .flights import Flights, Urge
from .keeping import Keeping, Recording
from .ledger import Ledger
from .replays import Replayed
from .trace import MAX_NAME, Record, Trace

Reuse = Literal["deterministic", "always", "never"]
_Request = TypeVar("_Request", bound=ModelRequest)
_BYPASS = CacheControl(mode="bypass")


class Backends(Protocol):
    """Who can compute an answer (`mesh.backends.BackendManager`)."""

    def open(
        self, request: Asked, *, local_only: bool = False, key: bytes = b""
    ) -> AbstractAsyncContextManager[Answering]: ...


class SharedAnswers(Protocol):
    """What the other members know (`node.sharing.Sharing`)."""

    async def find(
        self, key: bytes, request: Asked, tell: Callable[[str], None]
    ) -> tuple[StoredAnswer, str] | None:
        """A stored answer of a peer, fetched and verified, and that peer's id.

        `tell` is told why, if there is none.
        """
        ...

    def objection(self, key: bytes, request: Asked, stored: StoredAnswer) -> str:
        """Why an answer may not be given that another node computed and that lies here.

        It may if there is nothing to say.
        """
        ...

    def announce(self, key: bytes, request: Asked, stored: StoredAnswer) -> None:
        """Tell the others that this node has the answer."""
        ...


class ModelNames(Protocol):
    """What a person's model name means now (`node.names`)."""

    def resolve(self, request: _Request, tell: Callable[[str], None] = ...) -> _Request: ...


class Found(NamedTuple):
    """A stored answer, whether it was here or at a peer, and that peer."""

    stored: StoredAnswer
    status: CacheStatus
    peer: str


class Router:
    """Answers requests. See the module."""

    def __init__(
        self,
        *,
        backends: Backends,
        names: ModelNames,
        answers: AnswerCache,
        shared: SharedAnswers,
        ledger: Ledger,
        nursery: trio.Nursery,
        peer: str,
        node_of: Callable[[str], str],
        reuse: Reuse = "deterministic",
        deadline: float = math.inf,
        min_agreement: int = 1,
        urge: Urge = lambda id, priority: None,
        trace: Trace | None = None,
    ) -> None:
        self._backends = backends
        self.names = names
        self._answers = answers
        self.accounts = Accounts(answers.uses, ledger, peer)
        self._shared = shared
        self.keeping = Keeping(answers, shared.announce)
        self.flights = Flights(nursery, urge)
        self._peer = peer
        #: The name of a peer's node, as far as it is known.
        self._node_of = node_of
        self._reuse = reuse
        self._deadline = deadline
        self._min_agreement = min_agreement
        self.trace = trace or Trace()

    @asynccontextmanager
    async def open(
        self, request: GenerateRequest, *, local_only: bool = False
    ) -> AsyncIterator[Answering]:
        """Answer it. Raises a `GenerateError`, here or from the chunks.

        With `local_only` (a peer asks) only this node's cache and own providers are used: a request
        makes one hop, and there are no loops.
        """
        with (
            self.trace.begin(request, local_only) as record,
            self.accounts.open(request) as account,
        ):
            request = self.names.resolve(request, record.meant)
            key = request_key(request)
            record.model, record.key = request.model[:MAX_NAME], key
            record.reusing = reusing = self.may_reuse(request)
            found = await self.look_here(key, request, local_only, record) if reusing else None
            if found is not None:
                yield _noted(self._replay(found, record), key, record, account)
                return
            with self.within_its_time(request) as given:
                if reusing:
                    work = self._reuse_or_compute(key, request, local_only, record)
                else:
                    work = self._compute(key, request, local_only, record)
                async with work as answering:
                    given.chunks = answering.chunks
                    yield _noted(answering, key, record, account)

    @contextmanager
    def within_its_time(self, request: Asked) -> Iterator[_Given]:
        """The time that a request has. Raises `DeadlineExceeded` when it is over."""
        limit = self._deadline if request.deadline is None else request.deadline
        given = _Given()
        with trio.move_on_after(limit) as whole:
            yield given
        if whole.cancelled_caught:
            message = f"there was no whole answer within {limit:g} s"
            raise DeadlineExceeded(message, partial=given.text)

    def may_reuse(self, request: Asked) -> bool:
        """May a stored answer be given, or an equal request's computation be shared?

        Raises `CacheOnlyMiss` if it may not, and nothing else is wanted.
        """
        mode = request.cache.mode
        if mode == "only" and self._reuse == "never":
            raise CacheOnlyMiss("this node reuses no answers (cache.reuse is `never`)")
        if mode not in ("use", "only") or self._reuse == "never":
            return False
        return (
            self._reuse == "always"
            or request.deterministic
            or request.cache.any_sample
            or mode == "only"
        )

    @asynccontextmanager
    async def _reuse_or_compute(
        self, key: bytes, request: GenerateRequest, local_only: bool, record: Record
    ) -> AsyncIterator[Answering]:
        found = await self.look_at_peers(key, request, local_only, record)
        if found is not None:
            yield self._replay(found, record)
            return
        if request.cache.mode == "only":
            if not local_only:
                self.accounts.uses.count("misses")
            raise CacheOnlyMiss("no stored answer to this request")
        # The work may outlive the first asker, so a peer must not end it with that one's deadline.
        shared = msgspec.structs.replace(request, deadline=math.inf)
        record.flight = flight_key(key, request, local_only)
        flight = self.flights.join(
            record.flight,
            lambda: self._compute(key, shared, local_only, record),
            id=request.id,
            priority=request.priority,
        )
        async with flight as (answering, joined):
            if joined:
                record.joined = True
            yield answering

    async def look_here(
        self, key: bytes, request: Asked, local_only: bool, record: Record
    ) -> Found | None:
        """An answer that is here: it takes no time worth a limit."""
        stored = await self._answers.lookup(
            key,
            now=time.time(),
            kind=kind_for(request),
            max_age=request.cache.max_age,
            shared_only=local_only,
        )
        if stored is None:
            return None
        if stored.source != self._peer:
            objection = self._shared.objection(key, request, stored)
            if objection:
                record.doubt(stored.source, objection)
                return None
        return Found(stored, "hit-local", self._peer)

    async def look_at_peers(
        self, key: bytes, request: Asked, local_only: bool, record: Record
    ) -> Found | None:
        """An answer that a peer has."""
        if local_only or request.cache.scope == "local" or request.privacy == "local":
            return None
        record.asked_peers = True
        found = await self._shared.find(key, request, record.peers_have_none)
        return None if found is None else Found(found[0], "hit-mesh", found[1])

    def _replay(self, found: Found, record: Record) -> Answering:
        completion = found.stored.completion
        record.told_usage, record.told_reason = completion.usage, completion.finish_reason
        return Replayed(self.origin_of(found), found.stored)

    def origin_of(self, found: Found) -> Origin:
        """What is said of a stored answer."""
        stored, status, peer = found
        record = stored.record
        left = None if stored.expires_at is None else stored.expires_at - time.time()
        return Origin(
            peer=peer,
            node=self._node_of(peer),
            provider="cache",
            model=record.model,
            cache=status,
            cid=stored.cid_text,
            age=stored.age,
            ttl=None if left is None else max(0.0, left),
            weights=record.weights,
            engine=record.engine,
            numerics=record.numerics,
        )

    @asynccontextmanager
    async def _compute(
        self, key: bytes, request: GenerateRequest, local_only: bool, record: Record
    ) -> AsyncIterator[Answering]:
        async with self.ask(key, request, local_only) as (answering, started):
            if request.cache.mode != "bypass":
                answering.chunks = Recording(
                    self.keeping,
                    key,
                    request,
                    answering,
                    started,
                    record,
                    lambda origin: self._seen_from_here(origin, request),
                )
            yield answering

    @asynccontextmanager
    async def ask(
        self, key: bytes, request: Asked, local_only: bool
    ) -> AsyncIterator[tuple[Answering, float]]:
        """The answer of a backend, not stored yet, and when it was asked.

        With a deadline of `inf` whoever is asked is told none, though this node may have one.
        """
        started = trio.current_time()
        left = trio.current_effective_deadline() - started
        if request.deadline == math.inf:
            left = math.inf
        forwarded = msgspec.structs.replace(
            request,
            deadline=None if left == math.inf else max(left, 0.0),
            cache=self._cache_at_peers(request.cache),
        )
        async with self._backends.open(forwarded, local_only=local_only, key=key) as answering:
            answering.origin = self._seen_from_here(answering.origin, request)
            yield answering, started

    def _seen_from_here(self, origin: Origin, request: Asked) -> Origin:
        """What a backend says of the cache, as this node's callers are to see it."""
        cache = origin.cache
        if request.cache.mode == "bypass":
            cache = "bypass"
        elif cache == "bypass":  # an answer that may not stay at the peer is asked for so
            cache = "miss"
        elif origin.peer != self._peer and cache == "hit-local":
            cache = "hit-mesh"
        return origin if cache == origin.cache else msgspec.structs.replace(origin, cache=cache)

    def _cache_at_peers(self, cache: CacheControl) -> CacheControl:
        if cache.scope == "local":
            return _BYPASS  # it may not stay at a peer
        if cache.min_agreement is None and self._min_agreement > 1:
            return msgspec.structs.replace(cache, min_agreement=self._min_agreement)
        return cache


def _noted(answering: Answering, key: bytes, record: Record, account: Account) -> Answering:
    record.answered(answering.origin)
    return account.follow(answering, key)


def flight_key(key: bytes, request: Asked, local_only: bool) -> bytes:
    """Who may answer separates flights, though not stored answers.

    So a peer's request never follows one that may have gone to a peer: if that is the very one who
    asks here, each would wait for the other.
    """
    cache = request.cache
    who = (
        "here" if local_only else "",
        request.provider,
        request.peer,
        request.privacy,
        str(request.max_cost),
        cache.scope,
        str(cache.min_agreement),
    )
    return key + "\0".join(part or "" for part in who).encode()


class _Given:
    """What an answer has given so far."""

    def __init__(self) -> None:
        self.chunks: object = None

    @property
    def text(self) -> str:
        """Backends' answers and flights remember theirs; what else there is takes no time."""
        return getattr(self.chunks, "text", "")
