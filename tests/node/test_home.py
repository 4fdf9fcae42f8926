"""The node's folder: secrets that stay private and whole, peers, the running node, the lock."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fakes_cli import made
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.mesh.swarm_key import format_swarm_key, parse_swarm_key
from promptmesh.node.home import (
    MAX_ADDRESSES_PER_PEER,
    MAX_PEERS,
    Home,
    HomeError,
    HomeInUse,
    KnownPeers,
    Running,
)

PEER = "12D3KooWGRUQyF9z5ZJxkYbW3pB8xYyK8mJm3bS9Fh1m5W8mTzUu"
ADDRESS = f"/ip4/192.168.1.5/tcp/7412/p2p/{PEER}"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def ended_process() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_making_a_home(tmp_path: Path) -> None:
    home = Home(tmp_path / "a" / "b")
    assert home.make("# text") == ["identity.key", "swarm.key", "config.toml"]
    assert len(home.identity()) == 32
    assert len(home.swarm_key()) == 32
    assert home.config_path.read_text() == "# text"
    assert mode(home.path) == 0o700
    assert mode(home.identity_path) == mode(home.swarm_key_path) == 0o600
    assert home.warnings() == []
    # Nothing half-made is left behind.
    assert sorted(p.name for p in home.path.iterdir()) == [
        "config.toml",
        "identity.key",
        "swarm.key",
    ]


def test_making_it_again_changes_nothing(tmp_path: Path) -> None:
    home = made(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert home.make("other") == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_makers_at_once_agree(tmp_path: Path) -> None:
    start = threading.Barrier(8)
    seeds = []

    def make() -> None:
        start.wait()
        seeds.append(made(tmp_path).identity())

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seeds) == 8
    assert len(set(seeds)) == 1


def test_a_home_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HomeError, match="cannot be made"):
        Home(tmp_path / "file" / "home").make("")


def test_the_peer_id_is_libp2ps(tmp_path: Path) -> None:
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    home = made(tmp_path)
    pair = create_new_key_pair(home.identity())
    assert home.peer_id() == ID.from_pubkey(pair.public_key).to_base58()


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_damaged_identity(tmp_path: Path, size: int) -> None:
    home = made(tmp_path)
    home.identity_path.write_bytes(bytes(size))
    with pytest.raises(HomeError, match=rf"identity.key has {size} bytes instead of 32"):
        home.identity()


def test_missing_secrets(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with pytest.raises(HomeError, match=r"identity.key is missing: run `promptmesh init`"):
        home.identity()
    with pytest.raises(HomeError, match=r"swarm.key is missing: run `promptmesh init`"):
        home.swarm_key()


def test_loose_permissions_are_a_warning(tmp_path: Path) -> None:
    home = made(tmp_path)
    home.identity_path.chmod(0o644)
    (warning,) = home.warnings()
    assert "other users can read" in warning
    assert f"(mode 644); type: chmod 600 '{home.identity_path}'" in warning


def test_the_swarm_key_is_in_libp2ps_form(tmp_path: Path) -> None:
    home = made(tmp_path)
    home.write_swarm_key(bytes(range(32)))
    text = home.swarm_key_path.read_text()
    assert text == "/key/swarm/psk/1.0.0/\n/base16/\n" + bytes(range(32)).hex() + "\n"
    assert home.swarm_key() == bytes(range(32))
    assert mode(home.swarm_key_path) == 0o600


@given(st.binary(min_size=32, max_size=32))
def test_swarm_keys_come_back(key: bytes) -> None:
    text = format_swarm_key(key)
    assert parse_swarm_key(text) == key
    # As other programs write it.
    assert parse_swarm_key(text.rstrip().replace("\n", "\r\n")) == key


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"/key/swarm/psk/1.0.0/\n/base16/\n",
        b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"0" * 63,
        b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"g" * 64,
        b"/key/swarm/psk/1.0.0/\n/base64/\n" + b"0" * 64,
        b"\xff\xfe",
    ],
)
def test_a_damaged_swarm_key(tmp_path: Path, data: bytes) -> None:
    home = made(tmp_path)
    home.swarm_key_path.write_bytes(data)
    with pytest.raises(HomeError, match="is not a libp2p swarm key"):
        home.swarm_key()


def test_known_peers_come_back(tmp_path: Path) -> None:
    home = made(tmp_path)
    assert not home.known_peers()
    known = KnownPeers(bootstrap=(ADDRESS,), peers={PEER: (ADDRESS, ADDRESS)})
    home.write_known_peers(known)
    assert home.known_peers() == known
    assert mode(home.peers_path) == 0o600


def test_known_peers_are_bounded(tmp_path: Path) -> None:
    home = made(tmp_path)
    many = {f"{PEER}{n}": (ADDRESS,) * 100 for n in range(MAX_PEERS + 50)}
    home.write_known_peers(KnownPeers(bootstrap=(ADDRESS,) * 1000, peers=many))
    known = home.known_peers()
    assert list(known.peers) == list(many)[:MAX_PEERS]
    assert {len(addresses) for addresses in known.peers.values()} == {MAX_ADDRESSES_PER_PEER}
    assert len(known.bootstrap) == MAX_PEERS


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"peers": []}', '{"peers": {"a": 1}, "bootstrap": "x"}', "[" * 100_000],
)
def test_a_damaged_file_of_peers_counts_as_empty(tmp_path: Path, text: str) -> None:
    home = made(tmp_path)
    home.peers_path.write_text(text)
    assert not home.known_peers()


def test_wrong_addresses_are_left_out(tmp_path: Path) -> None:
    home = made(tmp_path)
    fields = {"bootstrap": ["x", 3, ADDRESS], "peers": {PEER: [ADDRESS, "/ip4/1.2.3.4/tcp/1"]}}
    home.peers_path.write_text(json.dumps(fields))
    assert home.known_peers() == KnownPeers(bootstrap=(ADDRESS,), peers={PEER: (ADDRESS,)})


def test_forgetting_the_mesh(tmp_path: Path) -> None:
    home = made(tmp_path)
    home.write_known_peers(KnownPeers(bootstrap=(ADDRESS,)))
    key, seed = home.swarm_key(), home.identity()
    home.forget_mesh()
    assert home.swarm_key() != key
    assert home.identity() == seed
    assert not home.known_peers()


def test_epochs_rise_whatever_the_clock_says(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.make("")
    times = [1000, 1000, 4_070_908_800_000, 2000, 0]
    epochs = [Home(tmp_path).next_epoch(now) for now in times]
    assert epochs == [1000, 1001, *(4_070_908_800_000 + n for n in range(3))]


@pytest.mark.parametrize("text", ["", "x", "-5", "1" * 5000, "9" * 20, "\xff"])
def test_a_damaged_epoch_is_the_time(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    home = Home(tmp_path)
    home.make("")
    home.epoch_path.write_text(text)
    assert home.next_epoch(1000) == 1000
    assert "is damaged" in caplog.text
    assert home.next_epoch(1000) == 1001


def test_an_epoch_that_cannot_be_written_is_the_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Home(tmp_path / "missing").next_epoch(1000) == 1000
    assert "is not remembered" in caplog.text


def test_the_running_node_is_found_while_it_runs(tmp_path: Path) -> None:
    home = made(tmp_path)
    assert home.running() is None
    with home.announced("127.0.0.1:7411"):
        assert home.running() == Running(os.getpid(), "127.0.0.1:7411")
    assert home.running() is None
    assert not home.node_path.exists()


def test_a_node_that_was_killed_does_not_run(tmp_path: Path) -> None:
    home = made(tmp_path)
    home.node_path.write_text(json.dumps({"pid": ended_process(), "http": "127.0.0.1:7411"}))
    assert home.running() is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", *(f'{{"pid": {pid}, "http": "x"}}' for pid in ('"1"', 0, -1, "1e99", 10**20))],
)
def test_a_damaged_node_file_is_no_node(tmp_path: Path, text: str) -> None:
    home = made(tmp_path)
    home.node_path.write_text(text)
    assert home.running() is None


def test_one_node_for_one_home(tmp_path: Path) -> None:
    home, other = made(tmp_path), Home(tmp_path)
    with home.lock(), home.announced("127.0.0.1:7411"):
        said = rf"a node runs on .* \(process {os.getpid()}, http://127.0.0.1:7411\)"
        with pytest.raises(HomeInUse, match=said), other.lock():
            pass
        assert home.running()  # the second one has not spoilt the first
    with other.lock():
        pass


def test_the_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    home = made(tmp_path)
    code = (
        "import sys, pathlib; from promptmesh.node.home import Home\n"
        f"home = Home(pathlib.Path({str(tmp_path)!r}))\n"
        "with home.lock(), home.announced('127.0.0.1:7411'):\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        running = home.running()
        assert running is not None
        assert running.pid == process.pid
        with pytest.raises(HomeInUse), home.lock():
            pass
        process.kill()
    with home.lock():
        assert not home.node_path.exists()  # what the killed one left is gone


def test_an_error_inside_the_lock_stays_itself(tmp_path: Path) -> None:
    home = made(tmp_path)
    with pytest.raises(BlockingIOError), home.lock():
        raise BlockingIOError
