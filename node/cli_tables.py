"""The commands that show something: peers, models, providers, config, version."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from .cli_mesh import home_of, typed
from .cli_output import (
    Column,
    byte_size,
    duration,
    print_json,
    print_table,
    printable,
    say,
    seconds,
)
from .cli_rights import rights_text
from .client import NodeClient, NodeNotRunning
from .config import load_config

NOTHING = "-"
#: The end of a peer id tells peers apart; all of ours begin alike.
PEER_TAIL = 8


def node_of(args: argparse.Namespace) -> NodeClient:
    """The node that runs on the folder. Raises `NodeNotRunning`."""
    home = home_of(args)
    running = home.running()
    if running is None:
        raise NodeNotRunning(f"no node runs on {home.path}")
    return NodeClient(running.http)


def peers(args: argparse.Namespace) -> int:
    """Who is in the mesh, this node first."""
    rows = node_of(args).get("/mesh/v1/peers")
    if args.json:
        print_json(rows)
        return 0
    columns = (
        Column("NODE"),
        Column("PEER"),
        Column("REACHED"),
        Column("FOR", right=True),
        Column("LOAD", right=True),
        Column("TOK/S", right=True),
        Column("MODELS", shrink=True),
        Column("RTT", right=True, optional=True),
        Column("MACHINE", shrink=True, optional=True),
    )
    print_table(columns, [_peer_row(row, first=i == 0) for i, row in enumerate(rows)])
    for row in rows:
        name = row["node"] or short_peer(row["peer"])
        for text in filter(None, (row.get("reason"), row.get("warning"))):
            say(f"{name}: {text}", "dim")
        if relaying := row.get("relaying"):
            say(f"{name}: {_relaying(relaying)}", "dim")
        if denied := rights_text(row):
            say(f"{name}: {denied} (`peers allow`)")
    if args.verbose:
        for row in rows[1:]:
            _print_peer(row)
    return 0


def _relaying(relaying: Mapping[str, Any]) -> str:
    """`relays for 2 members; circuits: beta - gamma (2), delta - gamma`."""
    places, circuits = relaying["places"], relaying["circuits"]
    for_whom = f"relays for {len(places)} member{'' if len(places) == 1 else 's'}"

    def name(end: Mapping[str, str]) -> str:
        return end["node"] or short_peer(end["peer"])

    told = [
        f"{name(circuit['from'])} - {name(circuit['to'])}"
        + (f" ({circuit['count']})" if circuit["count"] > 1 else "")
        for circuit in circuits
    ]
    return f"{for_whom}; circuits: {', '.join(told)}" if told else for_whom


def _peer_row(row: Mapping[str, Any], *, first: bool) -> Sequence[str]:
    providers = row.get("providers") or []
    rtt, since = row.get("rtt_ms"), row.get("since")
    return (
        _node_name(row) + (" (this)" if first else ""),
        short_peer(row["peer"]),
        "here" if first else row.get("via") or row["state"],
        NOTHING if since is None else duration(time.time() - since),
        _load(providers),
        _speed(providers),
        _names(model for provider in providers for model in provider["models"]),
        NOTHING if rtt is None else f"{rtt:.1f} ms",
        _machine(row),
    )


def _speed(providers: Sequence[Mapping[str, Any]]) -> str:
    """`31 of 90`: what is seen here of what is claimed there; `(90)`: it is only claimed."""
    seen = [
        (measured["answers"], measured["tokens_per_s"], provider.get("tokens_per_s"))
        for provider in providers
        for measured in provider.get("measured") or ()
        if measured["tokens_per_s"]
    ]
    if seen:
        _, rate, claimed = max(seen, key=lambda s: s[0])
        return f"{rate:.0f} of {claimed:.0f}" if claimed else f"{rate:.0f}"
    claims = [rate for provider in providers if (rate := provider.get("tokens_per_s"))]
    return f"({max(claims):.0f})" if claims else NOTHING


def _print_peer(row: Mapping[str, Any]) -> None:
    """All that is known of a peer: what it claims, and what this node measured."""
    print(f"\n{printable(_node_name(row))}  {row['peer']}")
    lines = [("address", row.get("address")), ("machine", _machine(row))]
    for provider in row.get("providers") or ():
        lines += [(provider["name"], text) for text in _provider_lines(provider)]
    before = ""
    for name, text in lines:
        if text and text != NOTHING:
            print(f"  {printable('' if name == before else name):<14}{printable(text)}")
            before = name


def _provider_lines(provider: Mapping[str, Any]) -> Iterable[str]:
    state = "" if provider["state"] == "ready" else f" ({provider['state']}: {provider['reason']})"
    claims = _pace(provider.get("ttft_s"), provider.get("tokens_per_s")) or "nothing of its speed"
    yield f"{_load([provider])} busy{state}; claims {claims}"
    for measured in provider.get("measured") or ():
        seen = _pace(measured["ttft_s"], measured["tokens_per_s"]) or "no speed yet"
        failed = f", {measured['errors']:.0%} of the last failed" if measured["errors"] else ""
        yield f"we see {seen} from {measured['model']} ({measured['answers']} answers{failed})"
    if paused := provider.get("paused"):
        yield f"left alone for {paused['seconds']:g} s more: {paused['reason']}"


def _pace(ttft: float | None, rate: float | None) -> str:
    parts = [f"{rate:.0f} tok/s"] if rate else []
    if ttft is not None:
        parts.append(f"{seconds(ttft)} to the first token")
    return ", ".join(parts)


def _node_name(row: Mapping[str, Any]) -> str:
    """Its name; of a peer that is no member the program, such as `kubo/0.22.0 (ipfs)`."""
    return row["node"] or (f"{row['ipfs']} (ipfs)" if row.get("ipfs") else NOTHING)


def short_peer(peer: str) -> str:
    """The end of a peer id, as the tables show it."""
    return f"…{peer[-PEER_TAIL:]}"


def _load(providers: Sequence[Mapping[str, Any]]) -> str:
    """`3/16 +2`: busy of all slots, and what waits."""
    if not providers:
        return NOTHING
    running, slots, waiting = (
        sum(provider.get(name) or 0 for provider in providers)
        for name in ("running", "slots", "waiting")
    )
    return f"{running}/{slots}" + (f" +{waiting}" if waiting else "")


def _names(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or NOTHING


def _machine(row: Mapping[str, Any]) -> str:
    """The GPUs with their memory and use, else processors and memory."""
    gpus = row.get("gpus") or ()
    if gpus:
        return ", ".join(
            f"{gpu['name']} {byte_size(gpu['memory_total'])} {gpu['utilisation']:.0%}"
            for gpu in gpus
        )
    machine = row.get("machine") or {}
    if not machine.get("cpus"):
        return NOTHING
    return f"{machine['cpus']} CPUs {byte_size(machine.get('memory_total') or 0)}"


def models(args: argparse.Namespace) -> int:
    """What can be asked, over all peers."""
    answer = node_of(args).get("/v1/models")
    if args.json:
        print_json(answer["data"])
        return 0
    if not answer["data"]:
        say(
            "No model can be asked: set local_hf.model or a provider in config.toml "
            f"(`{typed(args, 'providers')}` says what is wrong), or join a mesh that has one."
        )
        return 0
    columns = (Column("MODEL"), Column("CONTEXT", right=True), Column("OFFERED BY", shrink=True))
    print_table(columns, [_model_row(model) for model in answer["data"]])
    return 0


def _model_row(model: Mapping[str, Any]) -> Sequence[str]:
    ours = model.get("promptmesh") or {}
    offers = [
        f"{source['node'] or short_peer(source['peer'])}:{source['provider']}"
        for source in ours.get("sources") or ()
    ]
    context = ours.get("context_length")
    return (model["id"], str(context) if context else NOTHING, _names(offers))


def providers(args: argparse.Namespace) -> int:
    """What works on this machine, and what does not and why."""
    from .survey import survey  # trio and all that it builds

    home = home_of(args)
    try:
        own = node_of(args).get("/mesh/v1/providers")
    except NodeNotRunning:
        own = None
    rows = survey(load_config(home.path), home, own)
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode())
        return 0
    if own is None:
        say(f"no node runs here (`{typed(args, 'up')}`): this is what it would have", "dim")
    offered = [row for row in rows if row["offered"]]
    if offered:
        _print_offered(offered)
    else:
        say("This node has no providers: set local_hf.model, or add [[providers]], in config.toml.")
    _print_others([row for row in rows if not row["offered"]], apart=bool(offered))
    return 0


def _print_offered(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = (
        Column("NAME"),
        Column("KIND"),
        Column("STATE"),
        Column("LOAD", right=True),
        Column("SHARED"),
        Column("COST"),
        Column("MODELS", shrink=True),
    )
    print_table(columns, [_provider_row(row) for row in rows])
    for row in rows:
        if row.get("reason"):
            hint = f" ({row['hint']})" if row.get("hint") else ""
            say(f"{row['name']}: {row['reason']}{hint}")


def _print_others(rows: Sequence[Mapping[str, Any]], *, apart: bool) -> None:
    """Vendors that the node does not offer, with the next step for each."""
    if not rows:
        return
    if apart:
        print()
    columns = (Column("NOT OFFERED"), Column("STATE", shrink=True), Column("NEXT", shrink=True))
    print_table(columns, [_vendor_row(row) for row in rows])


def _vendor_row(row: Mapping[str, Any]) -> Sequence[str]:
    if row["state"] == "ready":
        table = f'kind = "{row["kind"]}"'
        return row["name"], "ready", f"generate_text may use it; [[providers]] {table} offers it"
    return row["name"], row["reason"] or row["state"], row["hint"] or NOTHING


def _provider_row(row: Mapping[str, Any]) -> Sequence[str]:
    shared = "yes" if row.get("share") else "no"
    load, models = _load([row]), _names(row["models"])
    return row["name"], row["kind"], row["state"], load, shared, _cost(row), models


def _cost(row: Mapping[str, Any]) -> str:
    """US dollars for a million tokens of prompt and answer, as far as that is known."""
    offers = msgspec.to_builtins(row.get("offers") or [])
    prices = [price for offer in offers if (price := offer.get("price"))]
    known = {(p.get("prompt", 0), p.get("completion", 0)) for p in prices} - {(0, 0)}
    if len(known) == 1:
        prompt, completion = known.pop()
        return f"${prompt:g} + ${completion:g}"
    if known:
        return "by model"
    return "paid" if row.get("paid") and not prices else "free"


def config(args: argparse.Namespace) -> int:
    """Every setting, and where it comes from."""
    home = home_of(args)
    loaded = load_config(home.path)
    if args.json:
        settings = {
            key: {"value": value, "source": source} for key, value, source in loaded.values()
        }
        print_json({"home": str(home.path), "settings": settings})
        return 0
    columns = (Column("KEY"), Column("VALUE", shrink=True), Column("FROM"))
    rows = [(key, _value(value), source) for key, value, source in loaded.values()]
    print_table(columns, [("(folder)", str(home.path), ""), *rows])
    for warning in loaded.warnings:
        say(warning, "yellow")
    return 0


def _value(value: object) -> str:
    """As the file would say it; nothing for what is left out."""
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def version(args: argparse.Namespace) -> int:
    """The installed version."""
    import importlib.metadata

    print(f"promptmesh {importlib.metadata.version('promptmesh')}")
    return 0
