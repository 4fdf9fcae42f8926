"""`version`, `id` and `swarm/*` of the Kubo RPC."""

from __future__ import annotations

import base64
import platform
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import base58

from ..mesh.transport import PeerId, TransportError
from .api_kubo_call import Call, Command, Failed

#: The Kubo whose API this is. `ipfshttpclient` 0.7.0 refuses anything but 0.4.23 to 0.7.x, and
#: 0.8.0a2 warns of anything but 0.5 to 0.8; later clients do not ask.
KUBO_VERSION = "0.7.0"


class Swarm(Protocol):
    """Which peers there are (`node.membership.Membership`)."""

    @property
    def addresses(self) -> Sequence[str]: ...

    @property
    def connections(self) -> Mapping[PeerId, str]: ...

    async def connect(self, address: str) -> None: ...


class NodeCommands:
    """The commands about this node and its connections."""

    def __init__(self, *, peer: PeerId, version: str, swarm: Swarm) -> None:
        self._peer = peer
        self._agent = f"promptmesh/{version}"
        self._swarm = swarm

    def commands(self) -> Mapping[str, Command]:
        return {
            "version": self.version,
            "id": self.id,
            "swarm/peers": self.peers,
            "swarm/addrs": self.addresses,
            "swarm/connect": self.connect,
        }

    async def version(self, call: Call) -> None:
        system = f"{platform.machine()}/{platform.system().lower()}"
        await call.emit(
            {"Version": KUBO_VERSION, "Commit": "", "Repo": "", "System": system, "Golang": ""}
        )

    async def id(self, call: Call) -> None:
        asked = call.arguments("peerid", needed=False)
        peer = asked[0].removeprefix("/p2p/") if asked else self._peer
        if peer == self._peer:
            await call.emit(self._described(peer, self._swarm.addresses, self._agent))
        elif peer in self._swarm.connections:
            address = f"{self._swarm.connections[peer]}/p2p/{peer}"
            await call.emit(self._described(peer, [address], ""))
        else:
            raise Failed(f"not connected to the peer {peer[:100]!r}")

    def _described(self, peer: PeerId, addresses: Sequence[str], agent: str) -> dict[str, Any]:
        return {
            "ID": peer,
            "PublicKey": _public_key(peer),
            "Addresses": list(addresses),
            "AgentVersion": agent,
            "ProtocolVersion": "ipfs/0.1.0",
            "Protocols": [],
        }

    async def peers(self, call: Call) -> None:
        peers = [
            {"Addr": address, "Peer": peer} for peer, address in self._swarm.connections.items()
        ]
        await call.emit({"Peers": peers})

    async def addresses(self, call: Call) -> None:
        connections = self._swarm.connections.items()
        await call.emit({"Addrs": {peer: [address] for peer, address in connections}})

    async def connect(self, call: Call) -> None:
        said = []
        for address in call.arguments("address"):
            # `ipfshttpclient` sends each character of the first address as a further argument.
            if len(address) == 1:
                continue
            try:
                await self._swarm.connect(address)
            except (TransportError, ValueError) as error:
                raise Failed(f"connect {address[:200]} failure: {error}") from error
            said.append(f"connect {address.rpartition('/p2p/')[2]} success")
        await call.emit({"Strings": said})


def _public_key(peer: PeerId) -> str:
    """The key of an Ed25519 id, which is in it behind the identity hash; "" for another kind."""
    multihash = base58.b58decode(peer)
    return base64.b64encode(multihash[2:]).decode() if multihash[:1] == b"\0" else ""
