"""Faults of the stored answers, with real daemons: kill -9, a full disk, a damaged file."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import trio
from daemons import ECHO, Daemon

from promptmesh.cache.cid import parse_cid, verify

pytestmark = pytest.mark.e2e

ROUNDS = 6
#: Answers that are acknowledged before each kill, and questions asked at the same time.
ACKNOWLEDGED, AT_ONCE = 40, 4
#: Liveness bound (s), with slack for a busy machine of two cores.
ANSWERED_IN = 60
BALLAST = "ballast"


async def ask(client: httpx.AsyncClient, prompt: str) -> tuple[str, str]:
    """The text and the CID of an answer, and "" where it was not stored."""
    message = {"role": "user", "content": prompt}
    body = {"model": "echo", "messages": [message], "temperature": 0}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    text = response.json()["choices"][0]["message"]["content"]
    return text, response.headers.get("x-promptmesh-cid", "")


def long_words(length: int) -> str:
    """So many bytes that are few words, as an echo answers word by word."""
    return " ".join(["x" * 4999] * (length // 5000))


async def ask_until_killed(daemon: Daemon, round_: int) -> dict[str, str]:
    """The CIDs of the answers that came before the daemon was killed, with their texts."""
    acknowledged: dict[str, str] = {}
    enough = trio.Event()

    async def ask_on(client: httpx.AsyncClient, asker: int) -> None:
        number = 0
        while True:
            number += 1
            prompt = f"{round_}.{asker}.{number}"
            if number % 5 == 0:
                prompt += f" {long_words(80_000)}"  # a root with leaves
            try:
                text, cid = await ask(client, prompt)
            except httpx.TransportError:
                return
            acknowledged[cid] = text
            if len(acknowledged) >= ACKNOWLEDGED:
                enough.set()

    async with httpx.AsyncClient(base_url=daemon.url, timeout=ANSWERED_IN) as client:
        with trio.fail_after(ANSWERED_IN):
            async with trio.open_nursery() as nursery:
                for asker in range(AT_ONCE):
                    nursery.start_soon(ask_on, client, asker)
                await enough.wait()
                await daemon.kill()
    return acknowledged


async def check(daemon: Daemon, acknowledged: dict[str, str]) -> None:
    """Everything that was acknowledged is there, and is what its CID names."""
    async with httpx.AsyncClient(base_url=daemon.url, timeout=ANSWERED_IN) as client:
        for cid, text in acknowledged.items():
            block = await client.get(f"/ipfs/{cid}?format=raw")
            assert block.status_code == 200, (cid, block.text)
            assert verify(parse_cid(cid), block.content)
            answer = await client.get(f"/mesh/v1/cache/{cid}/answer")
            assert answer.json()["text"] == text


async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "a", "a", ECHO)
    acknowledged: dict[str, str] = {}
    try:
        for round_ in range(ROUNDS):
            await daemon.start()
            acknowledged |= await ask_until_killed(daemon, round_)
        await daemon.start()
        await check(daemon, acknowledged)
        assert len(acknowledged) >= ROUNDS * ACKNOWLEDGED
        assert not (daemon.home / "cache.sqlite.damaged").exists()
        assert await daemon.stop() == 0
    finally:
        await daemon.aclose()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size. Skips where this process may not make one."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave no room on it."""
    with (disk / BALLAST).open("wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0


async def test_a_full_disk_costs_the_cache_and_no_answer(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        daemon = Daemon(disk / "a", "a", ECHO)
        try:
            await daemon.start()
            async with httpx.AsyncClient(base_url=daemon.url, timeout=ANSWERED_IN) as client:
                _, cid = await ask(client, "before")
                assert cid
                fill(disk)
                prompts = [f"{number} {long_words(50_000)}" for number in range(20)]
                answers = [await ask(client, prompt) for prompt in prompts]
                assert [text for text, _ in answers] == prompts
                assert "" in {cid for _, cid in answers}  # it was full indeed
                # What is there is still found, and once there is room all goes on as before.
                assert (await ask(client, "before"))[1] == cid
                (disk / BALLAST).unlink()
                text, after = await ask(client, "after")
                assert text == "after"
                assert after
                assert (await client.get(f"/ipfs/{after}?format=raw")).status_code == 200
            log = daemon.log.read_text()
            # Once for a row of faults; a small answer may fit in between.
            assert 0 < log.count("the cache failed") < 5, log
            assert "Traceback" not in log
            assert await daemon.stop() == 0
        finally:
            await daemon.aclose()


async def test_a_damaged_file_is_set_aside_at_the_start(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "a", "a", ECHO)
    home = daemon.home
    try:
        await daemon.start()
        async with httpx.AsyncClient(base_url=daemon.url, timeout=ANSWERED_IN) as client:
            first = await ask(client, "kept")
        assert await daemon.stop() == 0
        data = bytearray((home / "cache.sqlite").read_bytes())
        data[100 : len(data) : 7] = bytes(len(data[100 : len(data) : 7]))
        (home / "cache.sqlite").write_bytes(data)
        others = {
            path.name: path.read_bytes()
            for path in home.iterdir()
            if path.name != "log" and not path.name.startswith("cache.sqlite")
        }
        assert "identity.key" in others

        await daemon.start()
        assert (home / "cache.sqlite.damaged").read_bytes() == data
        assert "cache.sqlite" in daemon.log.read_text()
        for name, content in others.items():
            assert (home / name).read_bytes() == content, name
        async with httpx.AsyncClient(base_url=daemon.url, timeout=ANSWERED_IN) as client:
            missing = await client.get(f"/ipfs/{first[1]}?format=raw")
            assert missing.status_code == 404
            assert await ask(client, "kept") == first
            stored = await client.get(f"/ipfs/{first[1]}?format=raw")
            assert verify(parse_cid(first[1]), stored.content)
        assert await daemon.stop() == 0
    finally:
        await daemon.aclose()
