"""What was acknowledged is there after kill -9 in the middle of writes."""

import subprocess
import sys
import textwrap
from pathlib import Path

from promptmesh.cache.answers import AnswerCache
from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.cid import cid_of, verify
from promptmesh.cache.claims import unseal
from promptmesh.cache.database import Database

ROUNDS = 6
ACKNOWLEDGED = 150

WRITER = textwrap.dedent(
    """
    import sys
    from pathlib import Path

    import trio

    from promptmesh.cache.answers import AnswerCache
    from promptmesh.cache.blocks import SqliteBlocks
    from promptmesh.cache.claims import ClaimLog, Entry
    from promptmesh.cache.database import Database
    from promptmesh.providers.base import Completion


    async def main(path: str, first: int) -> None:
        database = Database(Path(path))
        answers = AnswerCache(database, SqliteBlocks(database), peer="me")
        log = ClaimLog(database, peer="me", sign=lambda data: bytes(64))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: answers.run(interval=0.01, clock=lambda: 1000.0))
            for number in range(first, first + 1_000_000):
                key = number.to_bytes(32, "big")
                size = 100_000 if number % 10 == 0 else 2_000
                completion = Completion(
                    text=f"{number} " + str(number) * (size // len(str(number))),
                    finish_reason="stop",
                )
                cid = (await answers.store(key, completion, model="m", now=1000.0)).cid
                entry = Entry(key, cid.raw, size, made_at=1000, expires_at=2000, held=False)
                envelope = log.seal([entry], namespace=bytes(8), now=1000.0)
                print(number, cid.raw.hex(), envelope.hex(), flush=True)
                await trio.sleep(0)


    trio.run(main, sys.argv[1], int(sys.argv[2]))
    """
)


def write_and_kill(path: Path, first: int) -> list[list[str]]:
    """The lines that the writer printed before it was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(first)],
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(ACKNOWLEDGED)]
        writer.kill()
        # A last line may be cut.
        lines += [line for line in writer.stdout.read().splitlines(True) if line.endswith("\n")]
    return [line.split() for line in lines]


async def check(path: Path, acknowledged: list[list[str]]) -> None:
    """All that was acknowledged is there, and nothing that is there is damaged."""
    database = Database(path)
    try:
        assert database.rows("PRAGMA integrity_check") == [("ok",)]
        assert database.rows("PRAGMA foreign_key_check") == []
        blocks = SqliteBlocks(database)
        answers = AnswerCache(database, blocks, peer="me")
        for number, cid, envelope in acknowledged:
            found = await answers.lookup(int(number).to_bytes(32, "big"), now=1000.0)
            assert found is not None
            assert found.cid.raw.hex() == cid
            assert found.completion.text.startswith(f"{number} ")
            stored = database.row(
                "SELECT count(*) FROM batch WHERE envelope = ?", (bytes.fromhex(envelope),)
            )
            assert stored == (1,)
        for digest, block in database.rows("SELECT digest, data FROM block"):
            assert verify(cid_of(digest, "raw"), block)
            assert await blocks.get(cid_of(digest)) == block
        # Also what was written and not acknowledged is whole: an answer with all its leaves.
        for (key,) in database.rows("SELECT DISTINCT key FROM answer"):
            assert await answers.lookup(key, now=1000.0) is not None
    finally:
        database.close()


async def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    acknowledged: list[list[str]] = []
    for round_ in range(ROUNDS):
        acknowledged += write_and_kill(path, 1 + round_ * 1_000_000)
        await check(path, acknowledged)
    batches = [unseal(bytes.fromhex(envelope)).batch for _, _, envelope in acknowledged]
    assert len(batches) >= ROUNDS * ACKNOWLEDGED
    assert len({batch.number for batch in batches}) == len(batches)
    assert len({batch.epoch for batch in batches}) == 1
    assert not (tmp_path / "cache.sqlite.damaged").exists()
