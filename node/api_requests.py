"""`/mesh/v1/requests`: why the last requests went where they went.

Here what `trace` remembers is put into words, and only when somebody asks for it. What a peer did
with a request is that peer's to tell: the id is the same there.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import trio

from ..mesh.policies import Candidate, Decision
from ..mesh.route import Route, Tried
from ..mesh.ruling_out import RuledOut
from ..providers.slots import Waiting
from .http_server import Request, Responder
from .openai_answers import usage_fields
from .router import Reuse
from .routes import send_problem
from .trace import MAX_REQUESTS, Record, Trace

JSON = "application/json"
#: Requests that are listed where nobody says how many.
LISTED = 20


class RequestsApi:
    """The handlers of `/mesh/v1/requests`."""

    def __init__(
        self,
        trace: Trace,
        key_text: Callable[[bytes], str],
        *,
        reuse: Reuse,
        node_of: Callable[[str], str],
        waiting: Callable[[str], Awaitable[Waiting | None]],
    ) -> None:
        """`key_text` writes the key of a question, `node_of` names a peer's node, `waiting` says
        where a request stands that waits for a slot, here or at a peer."""
        self._trace = trace
        self._key_text = key_text
        self._reuse = reuse
        self._node_of = node_of
        self._waiting = waiting

    async def last(self, request: Request, responder: Responder) -> None:
        """`GET /mesh/v1/requests?limit=N`: the last requests of this node, the newest first."""
        text = request.query.get("limit", [str(LISTED)])[-1]
        if not (text.isascii() and text.isdigit() and 0 < int(text[:9]) <= MAX_REQUESTS):
            await send_problem(responder, 400, f"limit: a number from 1 to {MAX_REQUESTS}")
            return
        records = self._trace.last(int(text))
        places = await self._places(records)
        shown = [self._show(record, places.get(record.id)) for record in records]
        body = msgspec.json.encode(shown)
        await responder.send(200, body, content_type=JSON)

    async def one(self, request: Request, responder: Responder, request_id: str) -> None:
        """`GET /mesh/v1/requests/ID`: as this node asked it, else as it answered it for a peer."""
        record = self._trace.find(request_id)
        if record is None:
            message = f"no request {request_id[:100]} is remembered: the last {MAX_REQUESTS} are"
            await send_problem(responder, 404, message)
            return
        place = (await self._places([record])).get(record.id)
        body = msgspec.json.encode(self._show(record, place))
        await responder.send(200, body, content_type=JSON)

    async def _places(self, records: Iterable[Record]) -> Mapping[str, Waiting]:
        """Where those stand that wait for a slot, by id."""
        places: dict[str, Waiting] = {}

        async def look(request_id: str) -> None:
            waiting = await self._waiting(request_id)
            if waiting is not None:
                places[request_id] = waiting

        async with trio.open_nursery() as nursery:
            for record in records:
                if record.state == "running":
                    nursery.start_soon(look, record.id)
        return places

    def _show(self, record: Record, place: Waiting | None) -> dict[str, Any]:
        route, now = record.route, trio.current_time()
        ended = now if record.ended is None else record.ended
        leader = self._trace.leader(record) if record.joined else None
        return {
            "id": record.id,
            # The trace counts in monotonic seconds, which mean nothing outside.
            "at": int(time.time() - (now - record.started)),
            "state": record.state,
            "error": {"message": record.error, "code": record.code} if record.error else None,
            "asker": self._node(record.asker) if record.for_peer else None,
            "task": record.task,
            "asked": {
                "model": record.asked,
                "provider": record.provider,
                "peer": record.peer,
                "policy": record.policy,
                "privacy": record.privacy,
                "cache": record.cache.mode,
            },
            "model": record.model,
            "model_why": record.model_why,
            "cache": self._cache(record, leader),
            "policy": route.policy if route else None,
            "candidates": [_candidate(c) for c in route.candidates] if route else [],
            "ruled_out": [_ruled_out(r) for r in route.ruled_out] if route else [],
            "choices": list(_choices(route)) if route else [],
            "attempts": [_tried(t) for t in route.tried] if route else [],
            "answered_by": _origin(record),
            "first_token_s": _seconds(record.started, route.first_at if route else None),
            "total_s": _seconds(record.started, ended),
            "usage": usage_fields(record.usage) if record.usage else None,
            "finish_reason": record.finish_reason,
            "waiting": place and {"place": place.place, "of": place.of, "wait_s": place.wait},
            "explained_on": self._elsewhere(record),
        }

    # --- the cache

    def _cache(self, record: Record, leader: Record | None) -> dict[str, Any]:
        status = record.origin.cache if record.origin else None
        return {
            "status": status,
            "key": self._key_text(record.key) if record.key else None,
            "cid": record.cid or (leader.cid if leader else None),
            "why": self._why(record, leader),
            "with": leader.id if leader else None,
        }

    def _why(self, record: Record, leader: Record | None) -> str:
        """Why the answer was reused, or not."""
        if not record.key:
            return ""
        origin = record.origin
        if origin is not None and origin.cache == "hit-local":
            return "the answer was stored here"
        if origin is not None and origin.cache == "hit-mesh":
            return f"{origin.node or origin.peer} had the answer stored"
        if record.joined:
            who = f" ({leader.id})" if leader else ""
            return f"an equal request was being answered{who}, and this one shared that"
        return _why_not_reused(record, self._reuse, self._node_of)

    # --- names

    def _node(self, peer: str) -> dict[str, str]:
        return {"peer": peer, "node": self._node_of(peer)}

    def _elsewhere(self, record: Record) -> dict[str, str] | None:
        """The node that knows the rest."""
        route = record.route
        remote = [t.candidate for t in route.tried if not t.candidate.own] if route else []
        return {"peer": remote[-1].peer, "node": remote[-1].node} if remote else None


def _why_not_reused(record: Record, reuse: Reuse, node_of: Callable[[str], str]) -> str:
    mode = record.cache.mode
    if mode in ("bypass", "refresh"):
        return f"the request says `{mode}`"
    if reuse == "never":
        return "this node reuses no answers (cache.reuse is `never`)"
    if not record.reusing:
        return "it may be answered anew: the temperature is not 0, and there is no seed"
    reasons = []
    if record.doubted:
        whose = node_of(record.doubted) or record.doubted
        stored = f"the answer of {whose} that is stored here"
        reasons.append(f"{stored} does not count ({record.objection})")
    elif record.cache.max_age is not None:
        reasons.append(f"no answer stored here is at most {record.cache.max_age:g} s old")
    else:
        reasons.append("no answer is stored here")
    if record.asked_peers:
        reasons.append(record.peers_lack or "none that counts came from a peer")
    elif not record.for_peer:
        what = "the scope" if record.cache.scope == "local" else "privacy"
        reasons.append(f"peers were not asked, as {what} is `local`")
    return ", and ".join(reasons)


# --- the route ----------------------------------------------------------------------------------


def _who(candidate: Candidate) -> dict[str, Any]:
    return {"peer": candidate.peer, "node": candidate.node, "provider": candidate.provider}


def _candidate(candidate: Candidate) -> dict[str, Any]:
    busy = candidate.busy
    return _who(candidate) | {
        "own": candidate.own,
        "running": busy.others + busy.in_flight,
        "slots": busy.slots,
        "loaded": candidate.offer.loaded,
        "prompt_seen": round(candidate.seen, 3),
    }


def _ruled_out(ruled_out: RuledOut) -> dict[str, Any]:
    reason = {"reason": ruled_out.reason, "retry_after_s": ruled_out.wait}
    return _who(ruled_out.candidate) | reason


def _tried(tried: Tried) -> dict[str, Any]:
    error = {"message": tried.error, "code": tried.code} if tried.error else None
    return _who(tried.candidate) | {
        "as": tried.role,
        "outcome": tried.outcome,
        "after": _who(tried.after) if tried.after else None,
        "at_character": tried.at if tried.after else None,
        "seconds": round(tried.seconds, 4),
        "error": error,
    }


def _choices(route: Route) -> Iterator[dict[str, Any]]:
    for decision in route.decisions:
        yield {"chosen": _who(decision.chosen), "weighed": _weighed(decision)}


def _weighed(decision: Decision) -> Sequence[dict[str, Any]]:
    """What the policy knew of each: the seconds it expected, its load, its turns."""
    weighed = []
    for number, candidate in enumerate(decision.among):
        fields = _who(candidate)
        fields["load"] = round(candidate.busy.all / candidate.busy.slots, 3)
        fields["turns"] = decision.turns.get(candidate.backend)
        if decision.expected:
            fields["expected"] = _expected(decision, number)
        weighed.append(fields)
    return weighed


def _expected(decision: Decision, number: int) -> dict[str, Any]:
    expected = decision.expected[number]
    first = expected.first
    parts = {
        "total_s": expected.total,
        "wait_s": expected.total - expected.idle,
        "first_token_s": first,
        "tokens_s": None if first is None else expected.idle - expected.trouble - first,
        "trouble_s": expected.trouble,
    }
    return {name: part and round(part, 4) for name, part in parts.items()}


def _origin(record: Record) -> dict[str, Any] | None:
    origin = record.origin
    if origin is None:
        return None
    return {
        "peer": origin.peer,
        "node": origin.node,
        "provider": origin.provider,
        "model": origin.model,
        "policy": origin.policy,
        "attempts": origin.attempts,
    }


def _seconds(started: float, at: float | None) -> float | None:
    return None if at is None else round(at - started, 4)
