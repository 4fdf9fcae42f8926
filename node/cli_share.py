"""`promptmesh share` and `open`: an answer out of the mesh, and what it is worth to who gets it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from ..providers.base import floats
from .cli_ask import MAX_PROMPT, body_of
from .cli_mesh import home_of
from .cli_output import fail, print_json, printable, say, warn
from .client import NodeClient, NodeNotRunning
from .home import Home, HomeError

if TYPE_CHECKING:
    from ..cache.share import Checked, CheckedClaim

#: Seconds that the node may take: a block may come from far.
PATIENCE = 120.0
PATH = "/mesh/v1/share/"


# --- share --------------------------------------------------------------------------------------


def share(args: argparse.Namespace) -> int:
    """Write a share, or pin it."""
    if args.pin and args.output:
        fail("--pin puts the share into the Kubo and writes no file: leave out --output")
        return 2
    try:
        question = _question(args)
    except ValueError as error:
        return fail(str(error))
    if args.output == "-" and sys.stdout.isatty():
        return fail("a CAR file is no text: send it somewhere (`> FILE`, or --output FILE)")
    asked: dict[str, object] = {"claims": not args.no_claims, "private": args.private}
    if question is not None:
        asked["request"] = question
    client = _client(home_of(args))
    if args.pin:
        return _pin(args, client, asked)
    path = PATH + quote(args.cid, safe="")
    return _write(args, client.ask("POST", path, asked, timeout=PATIENCE))


def _question(args: argparse.Namespace) -> dict[str, Any] | None:
    """The request that is to go along, as a body. Raises `ValueError` if it cannot be read."""
    if args.request is None and not args.with_request:
        return None
    source = args.request or "-"
    if source == "-" and sys.stdin is not None and sys.stdin.isatty():
        say("The question, as it was asked; Ctrl-D ends it:")
    try:
        text = _read(source, MAX_PROMPT).decode()
    except UnicodeDecodeError:
        raise ValueError("the question is not text") from None
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if isinstance(body, dict) and "messages" in body:
        return body
    # A shell's file ends in a newline that `ask "..."` did not send.
    prompt = text.removesuffix("\n")
    if not prompt.strip():
        raise ValueError("there is no question: give a prompt, or the JSON body of one")
    return body_of(prompt)


def _pin(args: argparse.Namespace, client: NodeClient, asked: dict[str, object]) -> int:
    path = PATH + quote(args.cid, safe="")
    pinned = client.post(path, {**asked, "pin": True}, timeout=PATIENCE)
    if args.json:
        print_json(pinned)
    else:
        print(pinned["cid"])
    say(f"Pinned in the Kubo at {pinned['kubo']}: the CID is of the share, with all that is in it.")
    if pinned["public"]:
        warn(f"all the world can read it now: {pinned['public']}")
    return 0


def _write(args: argparse.Namespace, data: bytes) -> int:
    """Write the file, and say what is in it."""
    from ..cache.cid import cid_text

    found = _checked(data, home_of(args))
    if args.output == "-":
        sys.stdout.buffer.write(data)
    else:
        target = Path(args.output or f"{cid_text(found.answer)}.car")
        try:
            _save(target, data, force=args.force)
        except FileExistsError:
            return fail(f"{target} is there already: --force writes over it")
        except OSError as error:
            return fail(f"{target} cannot be written: {error.strerror}")
        if args.json:
            print_json(_fields(found) | {"file": str(target), "bytes": len(data)})
        else:
            print(target)
    for line in _contents(found):
        say(line, "dim")
    return 0


def _save(target: Path, data: bytes, *, force: bool) -> None:
    """Raises `OSError`."""
    with target.open("wb" if force else "xb") as file:
        file.write(data)


def _contents(found: Checked) -> list[str]:
    """What whoever gets the file learns."""
    question = "with the question" if found.request else "without the question"
    peers = len({claim.peer for claim in found.claims})
    lines = [f"the answer {question}, and claims of {peers} peer{'' if peers == 1 else 's'}"]
    if found.others:
        lines.append(
            f"the claims also name {found.others} other answers of the mesh by their CIDs, which "
            "hold no text: --no-claims leaves them out"
        )
    return lines


# --- open ---------------------------------------------------------------------------------------


def open_share(args: argparse.Namespace) -> int:
    """Verify a share, and show what is in it."""
    from ..cache.car import CarError
    from ..cache.record_bounds import RecordError
    from ..cache.share import LIMITS, ShareError

    home = home_of(args)
    try:
        found = _checked(_source(args.source, home, LIMITS.bytes), home)
    except (CarError, ShareError, RecordError) as error:
        return fail(f"{args.source} does not verify: {error}")
    except ValueError as error:
        return fail(str(error))
    if args.json:
        print_json(_fields(found))
    else:
        _show(found)
    for problem in found.problems:
        fail(f"does not verify: {problem}")
    return 1 if found.problems else 0


def _source(source: str, home: Home, limit: int) -> bytes:
    """A file's bytes, or those that the node has. Raises `ValueError` or `NodeError`."""
    try:
        here = source == "-" or Path(source).exists()
    except OSError:  # no name that a file may have
        here = False
    if here:
        return _read(source, limit)
    if home.running() is None:
        raise NodeNotRunning(f"{source} is no file, and no node runs here to read a CID through")
    return _client(home).ask("GET", PATH + quote(source, safe=""), timeout=PATIENCE)


def _checked(data: bytes, home: Home) -> Checked:
    """Raises `CarError`, `ShareError` or `RecordError`."""
    from ..cache.share import check
    from ..mesh.identity import verify

    return check(data, verify=verify, secret_of=_secret_of(home))


def _secret_of(home: Home) -> Callable[[str], bytes | None]:
    """The namespaces of this folder's mesh, if it is a node's."""
    from ..cache.keys import namespace_secret

    try:
        swarm_key = home.swarm_key()
    except HomeError:
        return lambda name: None
    return lambda name: namespace_secret(swarm_key, name)


def _fields(found: Checked) -> dict[str, Any]:
    """What `--json` gives."""
    from ..cache.cid import cid_text

    return {
        "cid": cid_text(found.cid),
        "verified": not found.problems,
        "problems": list(found.problems),
        "answer": cid_text(found.answer),
        "model": found.record.model,
        "engine": found.record.engine,
        "weights": found.record.weights,
        **_content(found),
        "peer": found.peer or None,
        "made_at": found.made_at,
        "request": None if found.request is None else _as_json(found.request),
        "claims": [
            {
                "peer": claim.peer,
                "made_at": claim.made_at,
                "expires_at": claim.expires_at,
                "held": claim.held,
                "about_request": claim.about_request,
            }
            for claim in found.claims
        ],
    }


def _as_json(request: Mapping[str, Any]) -> Any:
    """The request in dag-json; its bytes where that has no form for what somebody wrote."""
    import cbrrr

    from ..cache.dag_json import encode

    try:
        return json.loads(encode(dict(request)))
    except ValueError:
        return json.loads(encode(cbrrr.encode_dag_cbor(dict(request))))


def _content(found: Checked) -> dict[str, Any]:
    """The answer, or the numbers of an embedding."""
    from ..cache.records import AnswerRecord

    if not isinstance(found.record, AnswerRecord):
        return {"embedding": floats(found.record.embedding.vector)}
    completion = found.record.completion
    return {
        "text": completion.text,
        "reasoning": completion.reasoning,
        "tool_calls": msgspec.to_builtins(completion.tool_calls),
        "finish_reason": completion.finish_reason,
    }


def _show(found: Checked) -> None:
    for name, value in _lines(found):
        say(f"{name:<9} {value}")
    for message in _list(found.request, "messages"):
        say(f"{_text(message, 'role')}: {_said(message)}")
    text = _content(found).get("text", "")
    if text:
        print(printable(text) if sys.stdout.isatty() else text)
    else:
        say("It has no text; --json shows what it has.")


def _lines(found: Checked) -> list[tuple[str, str]]:
    from ..cache.cid import cid_text

    lines = [("answer", f"{cid_text(found.answer)} of {found.record.model}")]
    if found.peer:
        made = _date(found.made_at or 0)
        lines.append(("shared by", f"{found.peer}, {made}"))
    lines += (("claim", _claim(claim)) for claim in found.claims)
    if found.peer and not found.claims:
        lines.append(("claim", "none: only who shared it says where it is from"))
    if found.request is not None:
        lines.append(("question", _whose_word(found)))
    return lines


def _claim(claim: CheckedClaim) -> str:
    """A claim that has run out was true as long as it held."""
    over = claim.expires_at <= time()
    ends = f"{'ran out' if over else 'holds until'} {_date(claim.expires_at)}"
    does = "has it" if claim.held else "computed it"
    return f"{claim.peer} signed that it {does}, {_date(claim.made_at)}; {ends}"


def _whose_word(found: Checked) -> str:
    """Who vouches that the answer is one to the question."""
    if any(claim.about_request for claim in found.claims):
        return "its key is that of the claim: who signed the claim says that this is the answer"
    return "that the answer is to it, who shared it says: only members can tell by the claims"


def _said(message: object) -> str:
    return " ".join(_text(part, "text") or "[no text]" for part in _list(message, "content"))


def _list(value: object, name: str) -> Sequence[object]:
    """A list in what somebody wrote; empty if it is none."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, list) else ()


def _text(value: object, name: str) -> str:
    """A text in what somebody wrote; empty if it is none."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""


def _date(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError, OSError):
        return f"at {seconds:.0f}"


# --- asking -------------------------------------------------------------------------------------


def _client(home: Home) -> NodeClient:
    """Raises `NodeNotRunning`."""
    running = home.running()
    if running is None:
        raise NodeNotRunning("no node runs here")
    return NodeClient(running.http)


def _read(source: str, limit: int) -> bytes:
    """A file, or standard input. Raises `ValueError` for one that is too long or unreadable."""
    try:
        if source == "-":
            data = sys.stdin.buffer.read(limit + 1) if sys.stdin is not None else b""
        else:
            with Path(source).open("rb") as file:
                data = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise ValueError(f"{source} has more than {limit} bytes")
    return data
