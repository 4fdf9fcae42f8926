import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from fakes_ipfs import ipfs_node
from fakes_kubo import NOT_FOUND, Answer, ScriptedKubo, json_reply, reply

from promptmesh.cache.blocks import StoreSize
from promptmesh.cache.cid import cid_bytes, cid_text
from promptmesh.cache.kubo import MAX_REPLY, KuboBlocks, KuboError
from promptmesh.cache.kubo_address import endpoint, is_private

BLOCK = b"some block"
CID = cid_bytes(BLOCK)
#: Seconds that a store gives its daemon here; a miss by that takes this long.
TIMEOUT = 0.5
#: Seconds after which a call hangs.
HANG = 60.0


@asynccontextmanager
async def kubo(
    timeout: float = HANG / 2, /, **script: bytes | Answer
) -> AsyncIterator[tuple[ScriptedKubo, KuboBlocks]]:
    """A daemon that answers so; `block_get` stands for `block/get`."""
    daemon = ScriptedKubo({name.replace("_", "/"): answer for name, answer in script.items()})
    async with daemon.running():
        with trio.fail_after(HANG):
            yield daemon, KuboBlocks(daemon.api, timeout=timeout)


# --- what a sound daemon says ---------------------------------------------------------------------


async def test_what_is_asked_of_the_daemon() -> None:
    stored = json_reply({"Key": cid_text(cid_bytes(BLOCK, "raw")), "Size": 10})
    script = {"block_put": stored, "block_get": reply(BLOCK), "block_stat": stored}
    async with kubo(**script) as (daemon, store):
        assert await store.put(CID, BLOCK)
        assert await store.get(CID) == BLOCK
        assert await store.has(CID)
    put, get, stat = daemon.asked
    # Kubo takes no other codec by both names, and older daemons know only the second.
    for option in ("cid-codec=raw", "format=raw", "mhtype=sha2-256", "allow-big-block=true"):
        assert option in put
    for asked in (get, stat):
        assert "offline=true" in asked
        assert f"timeout={HANG * 250:.0f}ms" in asked  # half of what it has
        assert asked.endswith(f"arg={cid_text(CID)}")


async def test_a_daemon_without_the_block_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    script = {"block_get": NOT_FOUND, "block_stat": NOT_FOUND, "pin_add": NOT_FOUND}
    async with kubo(**script, pin_rm=NOT_FOUND, block_rm=NOT_FOUND) as (_, store):
        assert await store.get(CID) is None
        assert not await store.has(CID)
        assert not await store.pin(CID)
        assert not await store.pin(CID, False)
        assert not await store.delete(CID)
        assert store.problem == ""
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_full_daemon_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    full = json_reply({"Message": "no space left on device", "Code": 0}, 500)
    async with kubo(block_put=full) as (_, store):
        assert not await store.put(CID, BLOCK)
        assert not await store.put(CID, BLOCK)
        assert "no space left" in store.problem
    assert caplog.text.count("no space left") == 1


# --- what any other may do ------------------------------------------------------------------------


async def never(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def dies(stream: trio.SocketStream) -> None:
    await stream.send_all(reply(bytes(1000))[:200])
    await stream.aclose()


async def closes(stream: trio.SocketStream) -> None:
    await stream.aclose()


async def stalls(stream: trio.SocketStream) -> None:
    await stream.send_all(reply(bytes(1000))[:200])
    await trio.sleep_forever()


async def drips(stream: trio.SocketStream) -> None:
    await stream.send_all(reply(bytes(1_000_000))[:100])
    while True:
        await stream.send_all(b"x")
        await trio.sleep(TIMEOUT / 10)


async def floods(stream: trio.SocketStream) -> None:
    """100 MB."""
    size = 100_000_000
    await stream.send_all(f"HTTP/1.1 200 X\r\ncontent-length: {size}\r\n\r\n".encode())
    for _ in range(size // 1_000_000):
        await stream.send_all(bytes(1_000_000))


async def floods_without_end(stream: trio.SocketStream) -> None:
    await stream.send_all(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        await stream.send_all(b"100000\r\n" + bytes(0x100000) + b"\r\n")


REDIRECT = b"HTTP/1.1 307 X\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"
FAULTS: dict[str, tuple[bytes | Answer, str]] = {
    "never answers": (never, "no answer|did not answer"),
    "dies": (dies, ""),
    "closes": (closes, ""),
    "stalls": (stalls, ""),
    "drips": (drips, "no answer"),
    "floods": (floods, f"more than {MAX_REPLY} bytes"),
    "floods without end": (floods_without_end, f"more than {MAX_REPLY} bytes"),
    "500": (reply(b"", 500), "500"),
    "500 as JSON": (json_reply([1], 500), "500"),
    "404": (reply(b"404 page not found", 404, "text/plain"), "404"),
    "wrong JSON": (reply(b'{"Key": '), ""),
    "other JSON": (json_reply({"Key": 7}), ""),
    "a list": (json_reply([]), ""),
    "two values": (reply(b'{"Key": "x"}{"Key": "y"}'), ""),
    "nothing": (reply(b""), ""),
    "another protocol": (b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n", ""),
    "redirect": (REDIRECT, ""),
}


#: Of these only time tells.
LATE = ("never answers", "stalls", "drips")


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_is_a_miss_and_one_line(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    answer, why = FAULTS[fault]
    commands = ("block_put", "block_get", "block_stat", "pin_add", "repo_stat", "pin_ls")
    patience = TIMEOUT if fault in LATE else HANG / 2
    async with kubo(patience, **dict.fromkeys(commands, answer)) as (_, store):
        assert not await store.put(CID, BLOCK)
        assert await store.get(CID) is None
        assert not await store.has(CID)
        assert not await store.pin(CID)
        assert await store.size() == StoreSize(0, 0, 0)
        assert store.problem
    lines = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert store.url in lines[0]

    assert re.search(why, lines[0])


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_of_what_the_library_lacks(fault: str) -> None:
    answer, _ = FAULTS[fault]
    script = dict.fromkeys(("block_rm", "bootstrap", "swarm_peers", "id"), answer)
    patience = TIMEOUT if fault in LATE else HANG / 2
    async with kubo(patience, **script, pin_rm=NOT_FOUND) as (_, store):
        assert not await store.delete(CID)
        try:
            assert "does not tell" in await store.exposure()
        except KuboError:
            assert fault != "404"


async def test_nobody_is_there(caplog: pytest.LogCaptureFixture) -> None:
    store = KuboBlocks("/ip4/127.0.0.1/tcp/1", timeout=HANG)
    assert await store.get(CID) is None
    assert not await store.put(CID, BLOCK)
    assert not await store.delete(CID)
    assert caplog.text.count("nothing listens there") == 1


async def test_other_bytes_are_no_block(caplog: pytest.LogCaptureFixture) -> None:
    async with kubo(block_get=reply(b"other bytes")) as (_, store):
        assert await store.get(CID) is None
    assert f"not what {cid_text(CID)} names" in caplog.text


async def test_another_cid_is_not_stored(caplog: pytest.LogCaptureFixture) -> None:
    other = json_reply({"Key": cid_text(cid_bytes(b"other"))})
    async with kubo(block_put=other) as (_, store):
        assert not await store.put(CID, BLOCK)
    assert "instead of" in caplog.text or "to what is" in caplog.text


async def test_it_works_again(caplog: pytest.LogCaptureFixture) -> None:
    async with kubo(block_get=reply(b"", 500)) as (daemon, store):
        for _ in range(2):
            assert await store.get(CID) is None
        daemon.script["block/get"] = reply(BLOCK)
        assert await store.get(CID) == BLOCK
        assert store.problem == ""
        daemon.script["block/get"] = reply(b"", 500)
        assert await store.get(CID) is None
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 2


async def test_threads_that_hang_hold_up_nobody() -> None:
    async with kubo(TIMEOUT, block_get=never, block_stat=json_reply({"Key": "x"})) as (_, store):
        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(store.get, CID)
        assert store.problem


async def test_the_environments_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    removed = json_reply({"Hash": "x"})
    async with kubo(block_get=reply(BLOCK), pin_rm=NOT_FOUND, block_rm=removed) as (_, store):
        assert await store.get(CID) == BLOCK
        assert await store.delete(CID)


# --- whom it tells --------------------------------------------------------------------------------

PRIVATE = {
    "bootstrap": json_reply({"Peers": None}),
    "swarm_peers": json_reply({"Peers": [{"Addr": "/ip4/192.168.1.7/tcp/4001", "Peer": "Q"}]}),
    "id": json_reply({"ID": "Q", "Addresses": ["/ip4/127.0.0.1/tcp/4001/p2p/Q"]}),
    "swarm_addrs_listen": json_reply({"Strings": ["/ip4/10.0.0.2/tcp/4001"]}),
}


async def test_a_daemon_that_is_private() -> None:
    async with kubo(**PRIVATE) as (_, store):
        assert await store.exposure() == ""
    js_ipfs = json_reply({"Message": "Not Found", "Code": 3}, 404)
    async with kubo(**PRIVATE | {"swarm_addrs_listen": js_ipfs}) as (_, store):
        assert await store.exposure() == ""


@pytest.mark.parametrize(
    ("command", "value", "why"),
    [
        ("bootstrap", {"Peers": ["/dnsaddr/bootstrap.libp2p.io/p2p/Q"]}, "Bootstrap"),
        ("bootstrap", {"Peers": ["auto"]}, "Bootstrap"),
        ("swarm_peers", {"Peers": [{"Addr": "/ip4/104.131.131.82/tcp/4001"}]}, "connected to"),
        ("swarm_peers", {"Peers": [{"Peer": "Q"}]}, "does not tell"),
        ("id", {"Addresses": ["/ip6/2606:4700::1/tcp/4001"]}, "listens on /ip6/2606"),
        ("swarm_addrs_listen", {"Strings": ["/ip4/8.8.8.8/udp/4001/quic-v1"]}, "listens on"),
    ],
)
async def test_a_daemon_that_may_be_public(command: str, value: object, why: str) -> None:
    async with kubo(**PRIVATE | {command: json_reply(value)}) as (_, store):
        assert why in await store.exposure()


@pytest.mark.parametrize("command", ["bootstrap", "swarm_peers", "id"])
@pytest.mark.parametrize("answer", [NOT_FOUND, reply(b"404 page not found", 404, "text/plain")])
async def test_a_daemon_that_does_not_tell(command: str, answer: bytes) -> None:
    async with kubo(**PRIVATE | {command: answer}) as (_, store):
        assert "does not tell" in await store.exposure()


async def test_another_node_of_ours_does_not_tell(tmp_path: Path) -> None:
    async with ipfs_node(tmp_path) as node:
        assert "does not tell" in await KuboBlocks(node.url, timeout=HANG).exposure()


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "multiaddr", "url"),
    [
        ("/ip4/127.0.0.1/tcp/5001", "/ip4/127.0.0.1/tcp/5001/http", "http://127.0.0.1:5001"),
        ("http://127.0.0.1:5001/", "/ip4/127.0.0.1/tcp/5001/http", "http://127.0.0.1:5001"),
        ("/ip6/::1/tcp/5001/http", "/ip6/::1/tcp/5001/http", "http://[::1]:5001"),
        ("http://[::1]:5001", "/ip6/::1/tcp/5001/http", "http://[::1]:5001"),
        ("http://localhost:5001", "/dns/localhost/tcp/5001/http", "http://localhost:5001"),
        ("/dns4/kubo.lan/tcp/443/https", "/dns4/kubo.lan/tcp/443/https", "https://kubo.lan:443"),
        ("https://kubo.lan", "/dns/kubo.lan/tcp/443/https", "https://kubo.lan:443"),
    ],
)
def test_where_an_rpc_is(text: str, multiaddr: str, url: str) -> None:
    assert endpoint(text) == (multiaddr, url)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:5001",
        "ftp://127.0.0.1:5001",
        "http://",
        "http://user:secret@127.0.0.1:5001",
        "http://127.0.0.1:5001/api",
        "http://127.0.0.1:5001?x",
        "http://127.0.0.1:70000",
        "/ip4/127.0.0.1",
        "/ip4/127.0.0.1/tcp/70000",
        "/ip4/127.0.0.1/tcp/x",
        "/ip4/127.0.0.1/udp/5001",
        "/ip4/::1/tcp/5001",
        "/ip4/localhost/tcp/5001",
        "/ip4/127.0.0.1/tcp/5001/ws",
        "/ip4/127.0.0.1/tcp/5001/http/more",
        "/dns/a b/tcp/5001",
        "/unix/tmp/kubo",
    ],
)
def test_where_no_rpc_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        endpoint(text)


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("/ip4/127.0.0.1/tcp/4001", True),
        ("/ip4/192.168.1.5/udp/4001/quic-v1/p2p/Q", True),
        ("/ip4/100.64.1.2/tcp/4001", True),
        ("/ip6/::1/tcp/4001", True),
        ("/ip6/fe80::1%eth0/tcp/4001", True),
        ("/ip6/::ffff:10.0.0.1/tcp/4001", True),
        ("/ip4/8.8.8.8/tcp/4001", False),
        ("/ip4/0.0.0.0/tcp/4001", False),
        ("/ip6/::ffff:8.8.8.8/tcp/4001", False),
        ("/ip6/2606:4700::1/tcp/4001", False),
        ("/dns4/localhost/tcp/4001", False),
        ("/ip4/10.0.0.1/tcp/4001/p2p/Q/p2p-circuit", False),
        ("/ip4/x/tcp/4001", False),
        ("", False),
    ],
)
def test_private_addresses(text: str, private: bool) -> None:
    assert is_private(text) is private
