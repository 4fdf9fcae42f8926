"""A real node whose disk is full goes on answering."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from daemons import ECHO, Daemon

pytestmark = pytest.mark.e2e

#: Liveness bound (s), with slack for a busy machine of two cores.
ANSWERED_IN = 180
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
    """Leave no room on it, also none that its node gives back meanwhile."""
    with (disk / BALLAST).open("wb", buffering=0) as ballast:
        while os.statvfs(disk).f_bavail:
            with suppress(OSError):
                ballast.write(bytes(4096))


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
