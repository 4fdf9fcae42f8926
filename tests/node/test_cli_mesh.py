"""The commands that make a node and its mesh, on real folders and against a node that is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fakes_cli import FakeNode, Problem, Turns, made, run

from promptmesh.node import cli_mesh
from promptmesh.node.config import load_config
from promptmesh.node.config_sections import Config
from promptmesh.node.home import Home, HomeInUse, KnownPeers
from promptmesh.node.join_link import JoinLink, decode, encode

PEER = "12D3KooWGRUQyF9z5ZJxkYbW3pB8xYyK8mJm3bS9Fh1m5W8mTzUu"
ADDRESS = f"/ip4/192.168.1.5/tcp/7412/p2p/{PEER}"
KEY = bytes(range(32))
LINK = encode(JoinLink(KEY, (ADDRESS,)))
THIS = {"peer": "12D3KooWThis", "node": "alpha", "state": "this", "address": ""}
RELOAD = "POST /mesh/v1/reload"
LEAVE = "POST /mesh/v1/leave"
PEERS = "GET /mesh/v1/peers"


def other(state: str = "connected", node: str = "beta") -> dict[str, Any]:
    return {"peer": PEER, "node": node, "state": state, "address": ADDRESS}


# --- init ---------------------------------------------------------------------------------------


def test_init_makes_a_node_and_says_what_is_next(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    ran = run(folder, "init", "--name", "alpha", "--model", "org/model")
    assert (ran.code, ran.out) == (0, "")
    typed = f"promptmesh --home {folder}"
    for said in ("identity.key", "alpha", "org/model", f"{typed} up", f"{typed} invite"):
        assert said in ran.err
    home = Home(folder)
    assert home.peer_id() in ran.err
    assert home.swarm_key().hex() not in ran.err
    config = load_config(folder, environ={})
    assert (config.node.name, config.local_hf.model) == ("alpha", "org/model")
    assert config.mesh.policy == "best_performance"


def test_init_again_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path, "init", "--name", "alpha")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ran = run(tmp_path, "init", "--name", "beta")
    assert ran.code == 0
    assert "node.name is 'alpha'" in ran.err
    assert "is complete" in ran.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_init_is_quiet_when_told_so(tmp_path: Path) -> None:
    assert run(tmp_path, "init", "--quiet", "--model", "m").err == ""
    assert run(tmp_path, "init", "--quiet", "--model", "m").err == ""
    # A model of a person's own choice needs no comment, none at all does.
    assert run(tmp_path, "init", "--quiet", "--model", "other").err == ""
    (tmp_path / "config.toml").write_text("")
    assert "local_hf.model is ''" in run(tmp_path, "init", "--quiet", "--model", "m").err


@pytest.mark.parametrize("flag", [("--name", "a/b"), ("--model", "a\x1bb")])
def test_init_writes_nothing_wrong(tmp_path: Path, flag: tuple[str, str]) -> None:
    ran = run(tmp_path / "node", "init", *flag)
    assert ran.code == 2
    assert f"{flag[0]} (" in ran.err
    assert not (tmp_path / "node").exists()


# --- up -----------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, Home]]:
    """Stands for the daemon; what it was given is in the list."""
    given: list[tuple[Config, Home]] = []

    def daemon(config: Config, home: Home) -> int:
        with pytest.raises(HomeInUse), Home(home.path).lock():
            pass
        given.append((config, home))
        return 0

    module = ModuleType("promptmesh.node.daemon")
    module.run = daemon  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "promptmesh.node.daemon", module)
    return given


def test_up_makes_what_is_missing_and_locks_it(
    tmp_path: Path, started: list[tuple[Config, Home]]
) -> None:
    ran = run(tmp_path / "node", "up")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    ((config, home),) = started
    assert len(home.identity()) == 32
    assert config.mesh.policy == "best_performance"
    assert "--http" not in config.sources.values()


def test_the_flags_of_up(tmp_path: Path, started: list[tuple[Config, Home]]) -> None:
    flags = "--http 127.0.0.1:0 --listen /ip4/127.0.0.1/tcp/0 --listen /ip6/::1/tcp/0 --no-mdns"
    run(tmp_path, "up", *flags.split(), "--name", "gamma", "--json-logs", PROMPTMESH_NODE_NAME="x")
    ((config, _),) = started
    assert config.http.listen == "127.0.0.1:0"
    assert config.mesh.listen == ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0")
    assert not config.mesh.mdns
    assert config.node.name == "gamma"
    assert config.node.json_logs
    assert config.sources["mesh.mdns"] == "--no-mdns"


def test_up_warns_of_what_is_probably_not_meant(
    tmp_path: Path, started: list[tuple[Config, Home]]
) -> None:
    made(tmp_path).identity_path.chmod(0o640)
    ran = run(tmp_path, "up", PROMPTMESH_MESH_POLCY="x")
    assert "chmod 600" in ran.err
    assert "did you mean PROMPTMESH_MESH_POLICY?" in ran.err


def test_up_refuses_a_second_node(tmp_path: Path, started: list[tuple[Config, Home]]) -> None:
    with made(tmp_path).lock():
        ran = run(tmp_path, "up")
    assert ran.code == 1
    assert f"a node runs on {tmp_path} already" in ran.err
    assert started == []


def test_up_does_not_listen_to_the_world(
    tmp_path: Path, started: list[tuple[Config, Home]]
) -> None:
    ran = run(tmp_path, "up", "--http", "0.0.0.0:7411")
    assert ran.code == 2
    assert "--http (http.listen)" in ran.err
    assert started == []


# --- invite -------------------------------------------------------------------------------------


def test_invite_gives_the_running_nodes_addresses(tmp_path: Path) -> None:
    home = made(tmp_path)
    loopback = f"/ip4/127.0.0.1/tcp/7412/p2p/{PEER}"
    status = {"GET /mesh/v1/status": {"addresses": [loopback, ADDRESS, "garbage"]}}
    with FakeNode(status).running(home):
        ran = run(tmp_path, "invite")
        as_json = run(tmp_path, "invite", "--json")
    assert decode(ran.out) == JoinLink(home.swarm_key(), (ADDRESS,))
    assert len(ran.out.splitlines()) == 1
    assert "holds the secret" in ran.err
    assert json.loads(as_json.out) == {"link": ran.out.strip()}


def test_invite_gives_loopback_where_there_is_nothing_else(tmp_path: Path) -> None:
    loopback = f"/ip4/127.0.0.1/tcp/7412/p2p/{PEER}"
    with FakeNode({"GET /mesh/v1/status": {"addresses": [loopback]}}).running(made(tmp_path)):
        assert decode(run(tmp_path, "invite").out).addresses == (loopback,)


def test_invite_waits_for_a_node_that_has_just_started(tmp_path: Path) -> None:
    turns = Turns({"addresses": []}, {"addresses": [ADDRESS]})
    with FakeNode({"GET /mesh/v1/status": turns}).running(made(tmp_path)):
        assert decode(run(tmp_path, "invite").out).addresses == (ADDRESS,)


def test_invite_to_a_node_that_nobody_can_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_mesh, "START_WAIT", 0.0)
    with FakeNode({"GET /mesh/v1/status": {"addresses": []}}).running(made(tmp_path)):
        assert "nobody could reach this node" in run(tmp_path, "invite").err


def test_invite_without_a_running_node(tmp_path: Path) -> None:
    home = made(tmp_path)
    home.config_path.write_text('[mesh]\nlisten = ["/ip4/10.1.2.3/tcp/7412"]')
    ran = run(tmp_path, "invite")
    assert ran.code == 0
    assert decode(ran.out).addresses == (f"/ip4/10.1.2.3/tcp/7412/p2p/{home.peer_id()}",)
    assert f"Start it: promptmesh --home {tmp_path} up" in ran.err


def test_invite_finds_this_machines_addresses(tmp_path: Path) -> None:
    home = made(tmp_path)  # listens on every interface
    addresses = decode(run(tmp_path, "invite").out).addresses
    assert addresses
    assert all(a.endswith(f"/tcp/7412/p2p/{home.peer_id()}") for a in addresses)
    assert not any("/0.0.0.0/" in a for a in addresses)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[mesh]\nlisten = ["/ip4/127.0.0.1/tcp/0"]', "nobody could reach this node"),
        ("[mesh]\nlisten = []", "nobody could reach this node"),
        ("[mesh]\nenabled = false", "mesh.enabled is false"),
    ],
)
def test_invite_into_nowhere(tmp_path: Path, text: str, said: str) -> None:
    made(tmp_path).config_path.write_text(text)
    ran = run(tmp_path, "invite")
    assert (ran.code, ran.out) == (1, "")
    assert said in ran.err


def test_invite_before_init(tmp_path: Path) -> None:
    ran = run(tmp_path, "invite")
    assert ran.code == 1
    assert "run `promptmesh init`" in ran.err


# --- join ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("join", LINK), ("join", "-")])
def test_join_before_the_first_start(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ran = run(tmp_path, *arguments, stdin=f"  {LINK}\n")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == f"joined. Now run: promptmesh --home {tmp_path} up\n"
    home = Home(tmp_path)
    assert home.swarm_key() == KEY
    assert home.known_peers() == KnownPeers(bootstrap=(ADDRESS,))
    assert len(home.identity()) == 32


@pytest.mark.parametrize(
    ("link", "said"),
    [
        (LINK[:-5], "5 of its"),
        ("hello", "is not a join link"),
        (LINK[:-9] + "AAAAAAAAA", "garbled"),
    ],
)
def test_a_spoilt_link_changes_nothing(tmp_path: Path, link: str, said: str) -> None:
    ran = run(tmp_path / "node", "join", link)
    assert (ran.code, ran.out) == (1, "")
    assert said in ran.err
    assert not (tmp_path / "node").exists()


def test_join_with_a_running_node_says_who_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_mesh, "POLL", 0)
    home = made(tmp_path)
    peers = Turns(
        [THIS],
        [THIS, other("unreachable")],
        [THIS, other(node="")],
        [THIS, other(), {**other(node=""), "peer": "12D3KooWThird"}],
    )
    with FakeNode({RELOAD: {}, PEERS: peers}).running(home) as node:
        ran = run(tmp_path, "join", LINK)
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == "joined: connected to beta, 12D3KooWThird\n"
    asked = [f"{each.method} {each.path}" for each in node.asked]
    assert asked == [RELOAD, PEERS, PEERS, PEERS, PEERS]
    assert home.swarm_key() == KEY


def test_join_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_mesh, "JOIN_WAIT", 0)
    home = made(tmp_path)
    answers = {RELOAD: {}, PEERS: [THIS, other("unreachable")]}
    with FakeNode(answers).running(home):
        ran = run(tmp_path, "join", LINK)
    assert ran.code == 1
    assert "no peer answered" in ran.err
    assert f"promptmesh --home {tmp_path} peers" in ran.err
    assert home.swarm_key() == KEY  # the node keeps trying


def test_join_says_why_the_node_could_not(tmp_path: Path) -> None:
    with FakeNode({RELOAD: Problem(500, "the port 7412 is taken")}).running(made(tmp_path)):
        ran = run(tmp_path, "join", LINK)
    assert ran.code == 1
    assert "the port 7412 is taken" in ran.err


def test_join_does_not_leave_another_mesh_unasked(tmp_path: Path) -> None:
    home = made(tmp_path)
    home.write_swarm_key(bytes(32))
    known = KnownPeers(bootstrap=(ADDRESS,), peers={PEER: (ADDRESS,)})
    home.write_known_peers(known)
    ran = run(tmp_path, "join", LINK)
    assert ran.code == 1
    assert "in another mesh, with 1 known peer." in ran.err
    assert "--replace" in ran.err
    assert home.swarm_key() == bytes(32)
    assert home.known_peers() == known
    assert run(tmp_path, "join", LINK, "--replace").code == 0
    assert home.swarm_key() == KEY
    assert home.known_peers() == KnownPeers(bootstrap=(ADDRESS,))


def test_joining_the_same_mesh_again_adds_addresses(tmp_path: Path) -> None:
    run(tmp_path, "join", LINK)
    second = f"/ip4/192.168.1.6/tcp/7412/p2p/{PEER}"
    assert run(tmp_path, "join", encode(JoinLink(KEY, (second,)))).code == 0
    assert Home(tmp_path).known_peers() == KnownPeers(bootstrap=(second, ADDRESS))


def test_a_node_does_not_join_itself(tmp_path: Path) -> None:
    home = made(tmp_path)
    link = encode(JoinLink(home.swarm_key(), (f"/ip4/1.2.3.4/tcp/1/p2p/{home.peer_id()}",)))
    ran = run(tmp_path, "join", link)
    assert ran.code == 1
    assert "this link was made by this node itself" in ran.err


# --- leave --------------------------------------------------------------------------------------


def test_leave_forgets_the_mesh(tmp_path: Path) -> None:
    run(tmp_path, "join", LINK)
    ran = run(tmp_path, "leave")
    assert (ran.code, ran.out) == (0, "")
    home = Home(tmp_path)
    assert home.swarm_key() != KEY
    assert not home.known_peers()


def test_leave_announces_it_first(tmp_path: Path) -> None:
    home = made(tmp_path)
    before = home.swarm_key()
    with FakeNode({LEAVE: {}, RELOAD: {}}).running(home) as node:
        assert run(tmp_path, "leave").code == 0
    assert [f"{each.method} {each.path}" for each in node.asked] == [LEAVE, RELOAD]
    assert home.swarm_key() != before


def test_leave_that_could_not_be_announced_changes_nothing(tmp_path: Path) -> None:
    home = made(tmp_path)
    before = home.swarm_key()
    with FakeNode({LEAVE: Problem(500, "no")}).running(home):
        assert run(tmp_path, "leave").code == 1
    assert home.swarm_key() == before


def test_leave_before_init(tmp_path: Path) -> None:
    assert run(tmp_path, "leave").code == 1
    assert list(tmp_path.iterdir()) == []
