"""Can others dial this node? Asks members to try, each by a connection of its own.

py-libp2p's AutoNAT reuses the connection that is there, and so finds everybody reachable. Here a
member that is asked dials anew, sees by noise that the asker is at the other end, and hangs up. It
dials the address from which the question came and no other, at ports that the asker names, seldom:
nobody can make it knock at a third party's door.

What a member finds holds for where that member is. A node counts as reachable if all that it asked
reached it, members that offer relaying first: who cannot be dialled by those needs them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import trio

from ..providers.base import Value
from .addresses import multiaddr, parse
from .frames import RemoteProtocolError, decode_value, encode_value
from .link import Link, open_stream
from .patches import Network
from .protobuf import varint
from .streams import read_delimited
from .transport import PeerId, Reach, TransportError
from .yamux_stream import YamuxStream

log = logging.getLogger(__name__)

DIAL_BACK = "/promptmesh/dial-back/1"
MAX_MESSAGE = 1024
#: Ports of one question that are tried.
MAX_PORTS = 2
#: Seconds to dial a port and see who is there; for the whole question.
DIAL_TIME, ASK_TIME = 4.0, 12.0
#: Seconds between two questions of one peer that are answered, and questions answered at once.
QUESTION_PAUSE, MAX_AT_ONCE = 10.0, 8
#: Members asked in one round.
ASKED = 3
#: Seconds from a reason to ask to asking; between two rounds at least; until the next one where
#: nothing happens, by what is known.
SETTLE, ROUND_PAUSE = 1.0, 15.0
PERIODS = {"reachable": 900.0, "unreachable": 120.0, "unknown": 300.0}

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Question(Value, frozen=True, kw_only=True):
    """Dial me at these ports of the address that you see me at."""

    ports: Annotated[tuple[Port, ...], msgspec.Meta(max_length=16)] = ()


class Finding(Value, frozen=True, kw_only=True):
    """What came of it."""

    outcome: Literal["reached", "failed", "refused"] = "refused"
    #: Where the asker was reached.
    address: Annotated[str, msgspec.Meta(max_length=100)] = ""


class DialBack:
    """Answers those who ask whether they can be dialled."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._asked: dict[PeerId, float] = {}
        self._running = 0
        network.serve(DIAL_BACK, self._serve)

    async def _serve(self, link: Link, stream: YamuxStream) -> None:
        with trio.fail_after(ASK_TIME):
            data = await read_delimited(stream, MAX_MESSAGE)
            try:
                question = decode_value(data, Question, limit=MAX_MESSAGE)
            except RemoteProtocolError as error:
                raise TransportError(f"{link.peer} asks nonsense: {error}") from error
            finding = Finding()
            remote = link.muxed_conn.get_remote_address()
            if remote is not None and self._may_ask(link.peer):
                self._running += 1
                try:
                    finding = await self._try(link, remote[0], question.ports[:MAX_PORTS])
                finally:
                    self._running -= 1
            await stream.send_all(_delimited(finding))

    def _may_ask(self, peer: PeerId) -> bool:
        now = trio.current_time()
        self._asked = {p: at for p, at in self._asked.items() if at + QUESTION_PAUSE > now}
        if peer in self._asked or self._running >= MAX_AT_ONCE:
            return False
        self._asked[peer] = now
        return True

    async def _try(self, link: Link, host: str, ports: Sequence[int]) -> Finding:
        for port in dict.fromkeys(ports):
            if await self._reaches(link, host, port):
                return Finding(outcome="reached", address=multiaddr(host, port))
        return Finding(outcome="failed")

    async def _reaches(self, link: Link, host: str, port: int) -> bool:
        """Is the peer there? By a connection that is made for this question only."""
        with trio.move_on_after(DIAL_TIME):
            try:
                wire = self._network.socket_wire(await trio.open_tcp_stream(host, port))
                await self._network.prove(wire, link.muxed_conn.peer_id)
                return True
            except Exception as error:  # whoever is there may answer anything; the asker is told
                log.debug("%s is not at port %d of %s: %r", link.peer, port, host, error)
        return False


@dataclass(slots=True)
class Reachability:
    """What members found. Pure."""

    state: Reach = "unknown"
    #: Where this node was reached though it does not know of the address: behind a router that
    #: forwards a port.
    outside: tuple[str, ...] = ()

    def conclude(self, findings: Mapping[PeerId, Finding], own: Sequence[str]) -> bool:
        """After a round. Has anything changed?"""
        answers = [found for found in findings.values() if found.outcome != "refused"]
        if not answers:
            return False
        before = (self.state, self.outside)
        failed = any(found.outcome == "failed" for found in answers)
        self.state = "unreachable" if failed else "reachable"
        seen = dict.fromkeys(f.address for f in answers if f.outcome == "reached")
        self.outside = tuple(a for a in seen if a and a not in own)
        return (self.state, self.outside) != before


class ReachabilityCheck:
    """Asks members whether this node can be dialled: as long as it is not known, when a relay or a
    new network is there, and from time to time."""

    def __init__(
        self,
        network: Network,
        *,
        own: Callable[[], Sequence[str]],
        speaks: Callable[[PeerId, str], bool],
        first: Callable[[PeerId], bool],
        changed: Callable[[], None],
    ) -> None:
        """`own`: where this node listens, as multiaddrs. `first`: should that peer be asked before
        others? `changed` is called when it is known otherwise than before."""
        self.known = Reachability()
        self._network = network
        self._own = own
        self._speaks = speaks
        self._first = first
        self._changed = changed
        #: Where this node listened when it last asked.
        self._asked_at: Sequence[str] = ()
        self._wake = trio.Event()

    def met(self, peer: PeerId) -> None:
        """A peer is there, and has said what it speaks: is that a reason to ask?"""
        moved = self._own() != self._asked_at
        if moved or self.known.state == "unknown" or self._first(peer):
            self._wake.set()

    async def run(self) -> None:
        """Know it, until cancelled."""
        while True:
            with trio.move_on_after(PERIODS[self.known.state]):
                await self._wake.wait()
            await trio.sleep(SETTLE)
            self._wake = trio.Event()
            if not await self._round():
                continue
            await trio.sleep(ROUND_PAUSE - SETTLE)

    async def _round(self) -> bool:
        """Ask some members. Could any be asked?"""
        links = [
            link
            for peer_id in list(self._network.connections)
            if (link := self._network.direct(peer_id)) is not None
            and self._speaks(link.peer, DIAL_BACK)
        ]
        links.sort(key=lambda link: not self._first(link.peer))
        own = self._asked_at = self._own()
        ports = list(dict.fromkeys(parse(address).port for address in own))[:MAX_PORTS]
        findings: dict[PeerId, Finding] = {}

        async def ask_one(link: Link) -> None:
            findings[link.peer] = await ask(link, ports)

        async with trio.open_nursery() as nursery:
            for link in links[:ASKED]:
                nursery.start_soon(ask_one, link)
        if self.known.conclude(findings, own):
            log.info("this node is %s for other members", self.known.state)
            self._changed()
        return bool(links)


async def ask(link: Link, ports: Sequence[int]) -> Finding:
    """What that member finds. Never raises: who does not answer has not found anything."""
    stream: YamuxStream | None = None
    try:
        with trio.fail_after(ASK_TIME):
            stream = await open_stream(link, [DIAL_BACK])
            await stream.send_all(_delimited(Question(ports=tuple(ports))))
            data = await read_delimited(stream, MAX_MESSAGE)
            return decode_value(data, Finding, limit=MAX_MESSAGE)
    except (TransportError, RemoteProtocolError, trio.TooSlowError) as error:
        log.debug("%s did not dial back: %r", link.peer, error)
        return Finding()
    finally:
        if stream is not None:
            await stream.aclose()


def _delimited(value: Question | Finding) -> bytes:
    data = encode_value(value)
    return varint(len(data)) + data
