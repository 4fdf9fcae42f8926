"""What became of the last requests: for people who ask why one went where it went.

One bounded object, told by plain calls what the router and the backends know anyway. It is put into
words only when somebody asks (`api_requests`), and holds no prompt and no answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from types import TracebackType
from typing import Literal, Protocol

import trio

from ..mesh.route import MAX_ERROR, Route
from ..providers.base import (
    Asked,
    CacheControl,
    FinishReason,
    GenerateError,
    Origin,
    Policy,
    Privacy,
    Usage,
)

#: Requests that are remembered: this node's own, and as many of its peers.
MAX_REQUESTS = 512
#: Candidates and ruled out ones that they name altogether (some hundred bytes each).
MAX_NAMED = 16_384
#: Characters that are kept of what a request names.
MAX_NAME = 200

State = Literal["running", "answered", "failed", "left"]


class Counting(Protocol):
    """Who adds up what is told of each request."""

    def begun(self, record: Record) -> None:
        """A request came."""

    def ended(self, record: Record) -> None:
        """One that has begun ended."""

    def refused(self, record: Record) -> None:
        """One failed before it had begun."""

    def settled(self, route: Route) -> None:
        """All candidates that are asked for a request were asked."""


class Record:
    """One request. As a context it lasts until the request has ended."""

    # Defaults of the class: most requests need few of them of their own.

    #: What was asked for. No task: the request could not be read.
    task = asked = ""
    provider: str | None = None
    peer: str | None = None
    policy: Policy | None = None
    privacy: Privacy = "any"
    cache = CacheControl()
    #: When it ended (monotonic seconds), and how.
    ended: float | None = None
    state: State = "running"
    error = code = ""
    #: What the model's name meant, and the key of the question.
    model = ""
    key = b""
    #: Why `auto` was that model.
    model_why = ""
    #: May a stored answer be given?
    reusing = False
    #: Who computed an answer that lies here and does not count ("": there is none), and why not.
    doubted = objection = ""
    #: Was the index of the peers' answers looked at, and why did that bring none?
    asked_peers = False
    peers_lack = ""
    #: Which flight it was in, and was that another request's?
    flight = b""
    joined = False
    origin: Origin | None = None
    cid: str | None = None
    route: Route | None = None
    #: What a stored answer, or embeddings, say of themselves.
    told_usage: Usage | None = None
    told_reason: FinishReason | None = None

    def __init__(
        self,
        request_id: str,
        for_peer: bool = False,
        asker: str = "",
        counting: Counting | None = None,
    ) -> None:
        self.id = request_id
        self._counting = counting
        #: Was it a peer that asked, and which?
        self.for_peer, self.asker = for_peer, asker
        self.started = trio.current_time()

    # --- what the router tells

    def meant(self, why: str) -> None:
        """Why `auto` is the model that it is."""
        self.model_why = why

    def doubt(self, source: str, objection: str) -> None:
        """An answer lies here that may not be given."""
        self.doubted, self.objection = source, objection

    def peers_have_none(self, why: str) -> None:
        """No peer has an answer that may be given."""
        self.peers_lack = why

    def answered(self, origin: Origin) -> None:
        """Who answers."""
        self.origin = origin
        if origin.cid is not None:
            self.cid = origin.cid

    def stored(self, origin: Origin, cid: str | None) -> None:
        """The answer was whole; who gave its end, and what it is stored as."""
        self.origin, self.cid = origin, cid

    # --- how it ended

    @property
    def usage(self) -> Usage | None:
        """The tokens, where the answer came to its end."""
        return self.told_usage or (self.route.usage if self.route else None)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended."""
        return self.told_reason or (self.route.finish_reason if self.route else None)

    @property
    def weight(self) -> int:
        """How many candidates it names."""
        route = self.route
        return len(route.candidates) + len(route.ruled_out) if route else 0

    def failed(self, error: BaseException) -> None:
        """It ended without a whole answer."""
        self.ended = trio.current_time()
        if isinstance(error, Exception):
            self.state = "failed"
            self.code = error.code if isinstance(error, GenerateError) else "internal_error"
            self.error = (str(error) or repr(error))[:MAX_ERROR]
        else:  # cancelled: nobody waits for the answer any more
            self.state = "left"

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.failed(error)
        else:
            self.ended, self.state = trio.current_time(), "answered"
        if self._counting is not None:
            self._counting.ended(self)


class Trace:
    """The last requests of this node, and the last that its peers had it answer."""

    def __init__(self, counting: Counting | None = None) -> None:
        self._counting = counting
        self._own: OrderedDict[str, Record] = OrderedDict()
        self._of_peers: OrderedDict[str, Record] = OrderedDict()
        self._named = 0

    def begin(self, request: Asked, for_peer: bool = False) -> Record:
        """A request of a program of this machine, or of a peer."""
        record = Record(request.id, for_peer, request.asker, self._counting)
        if self._counting is not None:
            self._counting.begun(record)
        record.task, record.asked = request.task, request.model[:MAX_NAME]
        record.policy, record.privacy, record.cache = request.policy, request.privacy, request.cache
        if len(request.cache.namespace) > MAX_NAME:
            record.cache = CacheControl(mode=request.cache.mode)
        if request.provider is not None:
            record.provider = request.provider[:MAX_NAME]
        if request.peer is not None:
            record.peer = request.peer[:MAX_NAME]
        self._add(record)
        return record

    def refused(self, request_id: str, error: GenerateError) -> None:
        """A request failed. If it could not even be read, that is all there is to know."""
        if request_id not in self._own:
            record = Record(request_id)
            record.failed(error)
            self._add(record)
            if self._counting is not None:
                self._counting.refused(record)

    def route(self, request: Asked, local_only: bool, route: Route) -> None:
        """How a request that is remembered goes among its candidates."""
        if self._counting is not None:
            route.on_settled = self._counting.settled
        record = (self._of_peers if local_only else self._own).get(request.id)
        if record is None:
            return
        self._named -= record.weight
        record.route = route
        self._named += record.weight
        while self._named > MAX_NAMED and len(self._own) + len(self._of_peers) > 1:
            self._drop_oldest(self._own if len(self._own) > 1 else self._of_peers)

    # --- asked

    def find(self, request_id: str) -> Record | None:
        """A request of this node, else of a peer (which cannot hide one of ours by its id)."""
        return self._own.get(request_id) or self._of_peers.get(request_id)

    def is_of(self, request_id: str, peer: str) -> bool:
        """Is the request of that id one of that peer?"""
        record = self._of_peers.get(request_id)
        return record is not None and record.asker == peer

    def last(self, count: int) -> list[Record]:
        """The last requests of this node, the newest first."""
        newest: Iterator[Record] = reversed(self._own.values())
        return [record for _, record in zip(range(count), newest, strict=False)]

    def leader(self, follower: Record) -> Record | None:
        """The request whose computation another one shared."""
        for record in reversed(self._own.values()) if follower.flight else ():
            if record.flight == follower.flight and not record.joined and record.route:
                return record
        return None

    def worker(self, request_id: str) -> str:
        """The id of the request whose computation that one waits for: mostly its own."""
        record = self.find(request_id)
        leader = None if record is None else self.leader(record)
        return request_id if leader is None else leader.id

    def attempts(self, request_id: str) -> int:
        """How many candidates were asked for it, by itself or by whose computation it shared."""
        record = self._own.get(request_id)
        if record is not None and record.route is None:
            record = self.leader(record)
        return len(record.route.tried) if record and record.route else 0

    # --- bounds

    def _add(self, record: Record) -> None:
        if not record.id or len(record.id) > MAX_NAME:
            return
        records = self._of_peers if record.for_peer else self._own
        if record.id in records:
            self._named -= records.pop(record.id).weight
        records[record.id] = record
        if len(records) > MAX_REQUESTS:
            self._drop_oldest(records)

    def _drop_oldest(self, records: OrderedDict[str, Record]) -> None:
        oldest = records.popitem(last=False)[1]
        if oldest.route is not None:
            self._named -= oldest.weight
