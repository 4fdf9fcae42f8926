"""`promptmesh explain`: why a request went where it went, in words and tables."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from .cli_output import Column, fail, print_json, print_table, printable, say, seconds
from .cli_tables import NOTHING, node_of, short_peer

_Fields = Mapping[str, Any]


def explain(args: argparse.Namespace) -> int:
    """Explain one request, the last one if none is named; or list the last ones."""
    node = node_of(args)
    if args.id and args.last is not None:
        fail("give an ID or --last, not both")
        return 2
    if args.last is not None:
        return _list(node.get(f"/mesh/v1/requests?limit={args.last}"), as_json=args.json)
    if args.id:
        request = node.get(f"/mesh/v1/requests/{quote(args.id, safe='')}")
    else:
        last = node.get("/mesh/v1/requests?limit=1")
        if not last:
            return fail("this node has had no request since it started")
        request = last[0]
    if args.json:
        print_json(request)
        return 0
    _explain(request)
    return 0


def _list(requests: Sequence[_Fields], *, as_json: bool) -> int:
    if as_json:
        print_json(requests)
        return 0
    columns = (
        Column("ID"),
        Column("TIME"),
        Column("MODEL", shrink=True),
        Column("CACHE"),
        Column("POLICY"),
        Column("ANSWERED BY", shrink=True),
        Column("TOOK", right=True),
        Column("STATE"),
    )
    print_table(columns, [_row(request) for request in requests])
    return 0


def _row(request: _Fields) -> Sequence[str]:
    by = request["answered_by"]
    return (
        request["id"],
        _time(request["at"]),
        request["model"] or request["asked"]["model"] or NOTHING,
        request["cache"]["status"] or NOTHING,
        request["policy"] or NOTHING,
        _name(by) if by else NOTHING,
        seconds(request["total_s"]),
        request["state"],
    )


def _explain(request: _Fields) -> None:
    print(_title(request))
    for name, text in _summary(request):
        if text:
            print(f"  {name:<13}{printable(text)}")
    for number, choice in enumerate(request["choices"], 1):
        _print_choice(number, choice, request)
    if request["ruled_out"]:
        print("\nRuled out")
        ruled_out = (Column("CANDIDATE"), Column("WHY"))
        print_table(ruled_out, [(_name(r), r["reason"]) for r in request["ruled_out"]])
    if request["attempts"]:
        print("\nAttempts")
        attempts = (Column("ASKED"), Column("TOOK", right=True), Column("HOW IT WENT"))
        print_table(attempts, [_attempt(attempt) for attempt in request["attempts"]])
    if request["explained_on"]:
        where = request["explained_on"]
        name = where["node"] or short_peer(where["peer"])
        say(f"What {name} did with it: `promptmesh explain {request['id']}` on {name}.", "dim")


def _title(request: _Fields) -> str:
    how = {
        "running": "under way",
        "answered": "answered",
        "failed": "failed",
        "left": "given up: nobody waited for it any more",
    }[request["state"]]
    took = f", {seconds(request['total_s'])}" if request["state"] != "running" else ""
    return printable(f"{request['id']}  {_time(request['at'])}  {how}{took}")


def _summary(request: _Fields) -> Sequence[tuple[str, str]]:
    asked, cache, by, usage = (request[n] for n in ("asked", "cache", "answered_by", "usage"))
    why = f" ({request['model_why']})" if request["model_why"] else ""
    meant = f", which means {request['model']}{why}" if request["model"] != asked["model"] else ""
    pins = [f"{n} {asked[n]}" for n in ("provider", "peer", "policy") if asked[n]]
    if asked["privacy"] != "any":
        pins.append(f"privacy {asked['privacy']}")
    error = request["error"]
    tokens = f"{usage['prompt_tokens']} + {usage['completion_tokens']}" if usage else ""
    tokens += " (estimated)" if usage and usage.get("estimated") else ""
    reason = request["finish_reason"]
    return (
        ("asked by", _name(request["asker"]) if request["asker"] else ""),
        ("asked for", ", ".join([asked["model"] + (meant if request["model"] else ""), *pins])),
        ("cache", ": ".join(t for t in (cache["status"], cache["why"]) if t)),
        ("policy", request["policy"] or ""),
        ("waiting", _waiting(request["waiting"])),
        ("answered by", _name(by) if by else ""),
        ("first token", f"after {seconds(first)}" if (first := request["first_token_s"]) else ""),
        ("tokens", tokens + (f", ended by {reason}" if tokens and reason else "")),
        ("cid", cache["cid"] or ""),
        ("error", error["message"] if error else ""),
    )


def _print_choice(number: int, choice: _Fields, request: _Fields) -> None:
    """What the policy knew of each, the one it took marked by `*`."""
    policy = request["policy"]
    which = f"Choice {number}" if len(request["choices"]) > 1 else "Choice"
    print(f"\n{which} ({_MEASURE[policy]})")
    expects = any("expected" in w for w in choice["weighed"])
    titles = ["CANDIDATE", "LOAD"]
    titles += _EXPECTED_TITLES if expects else ["TURNS"] if policy == "round_robin" else []
    columns = [Column(""), *(Column(title, right=i > 0) for i, title in enumerate(titles))]
    print_table(columns, [_weighed(w, choice["chosen"], titles) for w in choice["weighed"]])


#: What each policy goes by.
_MEASURE = {
    "round_robin": "round_robin: the fewest turns so far",
    "least_loaded": "least_loaded: the fewest requests for each slot",
    "best_performance": "best_performance: the fewest seconds until the whole answer",
}
_EXPECTED = ("total_s", "wait_s", "first_token_s", "tokens_s", "trouble_s")
_EXPECTED_TITLES = ["EXPECTED", "WAIT", "FIRST TOKEN", "TOKENS", "TROUBLE"]


def _weighed(weighed: _Fields, chosen: _Fields, titles: Sequence[str]) -> Sequence[str]:
    is_it = all(weighed[n] == chosen[n] for n in ("peer", "provider"))
    cells = ["*" if is_it else "", _name(weighed), f"{weighed['load']:g}"]
    expected = weighed.get("expected")
    if expected is not None:
        cells += [seconds(expected[name]) for name in _EXPECTED]
    elif "TURNS" in titles:
        cells.append(str(weighed["turns"]))
    return cells


def _attempt(attempt: _Fields) -> Sequence[str]:
    error = attempt["error"]
    went = error["message"] if error else "answered"
    asked = _asked_as(attempt)
    return (_name(attempt), seconds(attempt["seconds"]), f"{asked}: {went}" if asked else went)


def _asked_as(attempt: _Fields) -> str:
    """`continued alpha:vllm from character 120`; "" for one whose turn it was."""
    role, after = attempt["as"], attempt["after"]
    if after is None:
        return {"again": "once more", "hedge": "as well, the first token being late"}.get(role, "")
    where = f"{_name(after)} from character {attempt['at_character']}"
    return f"continued {where}" if role == "continue" else f"began anew, for {where}"


def _waiting(place: _Fields | None) -> str:
    """`number 2 of 3 for a slot, about 12.34 s more`."""
    if not place:
        return ""
    wait = place["wait_s"]
    about = "" if wait is None else f", about {seconds(wait)} more"
    return f"number {place['place']} of {place['of']} for a slot{about}"


def _name(who: _Fields) -> str:
    """`node:provider`, or as much of it as there is."""
    node = who["node"] or short_peer(who["peer"])
    return f"{node}:{who['provider']}" if who.get("provider") else node


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
