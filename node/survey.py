"""What could be asked from this machine: the configured providers, those found, and each vendor.

It builds what it asks, so it works without a node; nothing is generated, and no money spent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import trio

from ..providers.base import Health
from ..providers.options import SettingsError
from ..providers.registry import kinds
from .config import child_environment, router_settings
from .config_providers import SUBSCRIPTION_KINDS
from .config_sections import Config
from .finding_servers import find_servers, found_tables
from .home import Home
from .ledger import Ledger
from .node_database import NodeDatabase
from .own_providers import OwnProvider, build_providers
from .pricing import Purse
from .provider_rows import own_row
from .seed_providers import Planner, Unusable

#: Seconds for all of it: `check` keeps to 2 s.
LIMIT = 2.5
#: Kinds that somebody else runs, in the order of `generate_text`.
VENDOR_KINDS = (
    "openrouter",
    "codex_cli",
    "copilot_cli",
    "copilot_sdk",
    "gemini_cli",
    "claude_code",
)
#: The states in words, where a provider does not say what it wants.
SILENT = Health(state="unavailable", reason=f"it did not say within {LIMIT:g} s")

#: Seconds that its connections may take to close.
CLOSING = 0.3

Row = dict[str, Any]


@runtime_checkable
class Closes(Protocol):
    """A provider that keeps connections."""

    async def aclose(self) -> None: ...


def survey(config: Config, home: Home, rows: Sequence[Mapping[str, Any]] | None) -> list[Row]:
    """All of them, as `/mesh/v1/providers` tells; `rows` are what the running node says of its own,
    None: none runs. Raises `SettingsError`."""
    return trio.run(_survey, config, home, rows)


async def _survey(
    config: Config, home: Home, rows: Sequence[Mapping[str, Any]] | None
) -> list[Row]:
    until = trio.current_time() + LIMIT
    offered: list[Row] = [{**row, "offered": True} for row in rows or ()]
    others: list[Row] = []
    seen = {row["kind"] for row in offered}
    if rows is None:
        seen = {table.kind for table in config.providers}
    database = NodeDatabase(None)
    try:
        purse = Purse(Ledger(database, peer=""), peer="")

        async def look_here() -> None:
            offered.extend(await _here(config, home, purse, until))

        async def look_at_vendors() -> None:
            others.extend(await _vendors(config, home, purse, seen, until))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look_at_vendors)
            if rows is None:
                nursery.start_soon(look_here)
    finally:
        database.close()
    return [*offered, *others]


async def _here(config: Config, home: Home, purse: Purse, until: float) -> list[Row]:
    """What a node would have."""
    servers = found_tables(await find_servers(config), config)
    wanted = replace(config, providers=(*config.providers, *servers))
    owns = list(build_providers(wanted, child_environment(), home.path, purse))
    await _check(owns, until)
    return [own_row(own) | {"offered": True} for own in owns]


async def _vendors(
    config: Config, home: Home, purse: Purse, seen: Collection[str], until: float
) -> list[Row]:
    """Vendors that no table names: what a program could use, and what is missing for it."""
    planner = Planner(config, router_settings(), home)
    rows: list[Row] = []
    owns: list[OwnProvider] = []
    for kind in VENDOR_KINDS:
        if kind in seen or kind not in kinds():
            continue
        try:
            plan = planner.plan(kind, None)
            assert plan.build is not None
            owns.append(plan.build(purse))
        except (Unusable, SettingsError) as error:
            reason, _, hint = str(error).partition(": ")
            rows.append(_missing(kind, reason, hint))
    await _check(owns, until)
    return rows + [own_row(own) | {"offered": False} for own in owns]


def _missing(kind: str, reason: str, hint: str) -> Row:
    return {
        "name": kind,
        "kind": kind,
        "models": [],
        "state": "unavailable",
        "reason": reason,
        "hint": hint,
        "share": False,
        "paid": kind in SUBSCRIPTION_KINDS or kind == "openrouter",
        "offered": False,
    }


async def _check(owns: Sequence[OwnProvider], until: float) -> None:
    """Ask all of them at once how they are, until then."""

    async def ask(own: OwnProvider) -> None:
        if own.kind == "local_hf":
            own.health = Health(state="starting", reason="it is loaded when the node starts")
            return
        own.health = SILENT
        provider = own.admission.provider
        try:
            with trio.move_on_at(until):
                own.health = await provider.check()
        finally:
            if isinstance(provider, Closes):
                with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSING):
                    await provider.aclose()

    async with trio.open_nursery() as nursery:
        for own in owns:
            nursery.start_soon(ask, own)
