"""Model servers of this machine that nobody configured: found at the start and while the node runs.

One that is found is a provider like those of `config.toml`, until it has been silent for a while.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from ..providers.admission import Admission
from ..providers.http_address import parse_base_url
from ..providers.local_servers import Found, look
from ..providers.registry import build
from .config_providers import ProviderConfig
from .config_sections import Config
from .own_providers import DEFAULT_SLOTS, OwnProvider, OwnProviders

logger = logging.getLogger(__name__)

KIND = "openai_compatible"
#: Seconds between two looks at a port where nothing listens; and where something else does, first
#: and at most: it is none of our business.
LOOK_FREE = 5.0
LOOK_TAKEN, LOOK_TAKEN_LAST = 60.0, 3600.0
#: Seconds between two looks at one that was found, and how often it may be missed before it goes.
LOOK_FOUND, MISSES = 10.0, 3
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def ports_of(config: Config) -> list[int]:
    """The ports to look at: not those that a table of the configuration has."""
    if not config.local_servers.enabled:
        return []
    known = set()
    for table in config.providers:
        if isinstance(url := table.options.get("base_url"), str):
            try:
                address = parse_base_url(url)
            except ValueError:
                continue  # who builds it says what is wrong
            if address.host in _LOOPBACK:
                known.add(address.port)
    ports = dict.fromkeys(int(port) for port in config.local_servers.ports)
    return [port for port in ports if port not in known]


async def find_servers(config: Config) -> list[Found]:
    """Those that answer now."""
    found: dict[int, Found] = {}

    async def ask(port: int) -> None:
        if (server := (await look(port)).found) is not None:
            found[port] = server

    ports = ports_of(config)
    async with trio.open_nursery() as nursery:
        for port in ports:
            nursery.start_soon(ask, port)
    return [found[port] for port in ports if port in found]


def named(found: Iterable[Found], taken: Iterable[str]) -> dict[str, Found]:
    """Each with a name of its own: what it is, or with its port where that is taken."""
    names: dict[str, Found] = {}
    all_taken = set(taken)
    for server in found:
        name = server.kind
        if name in all_taken or server.kind == "server":
            name = f"{server.kind}-{server.port}"
        all_taken.add(name)
        names[name] = server
    return names


def table_of(name: str, server: Found, config: Config) -> ProviderConfig:
    """The table that would configure it."""
    return ProviderConfig(
        kind=KIND,
        name=name,
        share=config.local_servers.share,
        options={"base_url": server.base_url},
    )


@dataclass
class ServerFinder:
    """Looks at the ports while the node runs, and brings and takes away providers."""

    config: Config
    providers: OwnProviders

    async def run(self) -> None:
        """Look until cancelled, at each port by itself."""
        async with trio.open_nursery() as nursery:
            for port in ports_of(self.config):
                nursery.start_soon(self._watch, port)

    async def _watch(self, port: int) -> None:
        pause = LOOK_TAKEN
        while True:
            looked = await look(port)
            if looked.found is not None:
                pause = LOOK_TAKEN
                await self._offer(looked.found)
            elif looked.taken:
                await trio.sleep(pause)
                pause = min(2 * pause, LOOK_TAKEN_LAST)
            else:
                pause = LOOK_TAKEN
                await trio.sleep(LOOK_FREE)

    async def _offer(self, server: Found) -> None:
        """Offer it until it is gone, or another is there in its place."""
        (name,) = named([server], (own.name for own in self.providers))
        own = self._provider(table_of(name, server, self.config))
        logger.info("found %s at 127.0.0.1:%d", name, server.port)
        with self.providers.added(own):
            missed = 0
            while missed < MISSES:
                await trio.sleep(LOOK_FOUND)
                now = (await look(server.port)).found
                if now is not None and now.kind != server.kind:
                    break
                missed = 0 if now is not None else missed + 1
        logger.info("%s is gone from 127.0.0.1:%d", name, server.port)

    def _provider(self, table: ProviderConfig) -> OwnProvider:
        return OwnProvider(
            name=table.name,
            kind=KIND,
            admission=Admission(
                build(KIND, table.name, table.options),
                slots=DEFAULT_SLOTS[KIND],
                max_waiting=self.config.limits.max_waiting,
            ),
            shared=table.share,
            paid=False,
        )


def found_tables(found: Sequence[Found], config: Config) -> list[ProviderConfig]:
    """Those that were found, as tables of a configuration."""
    names = named(found, (table.name for table in config.providers))
    return [table_of(name, server, config) for name, server in names.items()]


def find_now(config: Config) -> list[Found]:
    """`find_servers`, for a command."""
    return trio.run(partial(find_servers, config)) if ports_of(config) else []
