"""Finding the other nodes of the mesh on the local network, by multicast DNS.

Each node announces a service with its peer id, a tag of its mesh, and its addresses. What is found
is a hint: who really listens there, the connection shows. The library has threads of its own; here
they are started, stopped and heard without ever blocking the event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import trio
from zeroconf import Error, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from .transport import PeerId

log = logging.getLogger(__name__)

SERVICE = "_promptmesh._tcp.local."

#: Addresses that are announced and taken, and the characters of one: a packet holds no more.
MAX_ADDRESSES = 8
MAX_LENGTH = 120
#: Seconds after which new addresses of this machine are announced.
REFRESH = 20.0
#: Seconds until the next try where there is no multicast.
RETRY = 60.0
#: Milliseconds to wait for what an announced service says of itself.
RESOLVE = 3000
#: Seconds that saying goodbye may take.
FAREWELL = 2.0

#: A thread that takes too long is left behind.
_LEAVE_BEHIND: dict[str, Any] = {"abandon_on_cancel": True}

Found = Callable[[PeerId, list[str]], None]


async def discover(
    peer: PeerId, addresses: Callable[[], Sequence[str]], tag: str, found: Found
) -> None:
    """Announce this node and hear of others, until cancelled.

    `tag` tells meshes apart; whoever sees it must learn nothing from it. `found` is called in the
    event loop with a peer of the same tag and its addresses, again whenever it announces itself
    anew. A network without multicast is logged once, and tried again.
    """
    token = trio.lowlevel.current_trio_token()

    def hear(other: PeerId, at: list[str]) -> None:
        if other != peer:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(found, other, at)

    told = False
    while True:
        announced = tuple(addresses())
        responder = Responder(peer, announced, tag, hear)
        try:
            await trio.to_thread.run_sync(responder.start)
            while tuple(addresses()) == announced:  # noqa: ASYNC110 - nobody tells of new ones
                await trio.sleep(REFRESH)
        except Exception as error:  # no way of finding nodes is worth the node; it is logged once
            if not told:
                log.warning("nodes of this network are not found by themselves: %s", error)
                told = True
            await trio.sleep(RETRY)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + FAREWELL):
                await trio.to_thread.run_sync(responder.stop, **_LEAVE_BEHIND)


class Responder:
    """The announcement of one node, and what it hears. Its methods block."""

    def __init__(self, peer: PeerId, addresses: Sequence[str], tag: str, hear: Found) -> None:
        self._tag = tag
        self._hear = hear
        self._zeroconf: Zeroconf | None = None
        self._browser: ServiceBrowser | None = None
        self._info = service_info(peer, addresses, tag)

    def start(self) -> None:
        """Announce and listen. Raises whatever the library does where there is no multicast."""
        self._zeroconf = Zeroconf(use_asyncio=False)
        # Cooperating: the name is a peer id, and what we said before we restarted is no conflict.
        self._zeroconf.register_service(self._info, cooperating_responders=True)
        self._browser = ServiceBrowser(self._zeroconf, SERVICE, handlers=[self._changed])

    def stop(self) -> None:
        if self._zeroconf is not None:
            self._zeroconf.unregister_all_services()
            if self._browser is not None:
                # What it still looks up waits for the library's loop, which `close` ends.
                self._browser.cancel()
            self._zeroconf.close()

    def _changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            return
        try:
            info = zeroconf.get_service_info(service_type, name, timeout=RESOLVE)
        except Error as error:  # the library's loop is busy or gone; it will be announced again
            log.debug("%s was not looked up: %r", name, error)
            return
        announced = parse(info.properties, self._tag) if info is not None else None
        if announced is not None:
            self._hear(*announced)


def service_info(peer: PeerId, addresses: Sequence[str], tag: str) -> ServiceInfo:
    """The service that a node announces."""
    places = [address.partition("/p2p/")[0] for address in addresses][:MAX_ADDRESSES]
    properties = {"id": peer, "mesh": tag}
    properties |= {f"a{number}": place for number, place in enumerate(places)}
    hosts = [place.split("/")[2] for place in places if place.startswith(("/ip4/", "/ip6/"))]
    return ServiceInfo(
        SERVICE,
        f"{peer}.{SERVICE}",
        port=int(places[0].split("/")[4]) if places else 0,
        properties=properties,
        server=f"{peer}.local.",
        parsed_addresses=hosts or ["127.0.0.1"],
    )


def parse(properties: Mapping[bytes, bytes | None], tag: str) -> tuple[PeerId, list[str]] | None:
    """Peer and addresses that somebody announced; None if it is of another mesh, or nonsense."""
    try:
        fields = {key.decode(): (value or b"").decode() for key, value in properties.items()}
    except UnicodeDecodeError:
        return None
    peer = fields.get("id", "")
    if fields.get("mesh") != tag or not peer.isalnum() or len(peer) > 64:
        return None
    places = [fields.get(f"a{number}", "") for number in range(MAX_ADDRESSES)]
    wanted = [p for p in places if p.startswith("/") and len(p) <= MAX_LENGTH and p.isprintable()]
    return peer, [f"{place}/p2p/{peer}" for place in wanted]
