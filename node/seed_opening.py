"""Opening the engine of the Python API over the node's folder, or over none."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import trio

from ..cache.answers import AnswerCache
from ..cache.blocks import SqliteBlocks
from ..cache.database import Database
from .config import child_environment
from .config_sections import Config
from .home import Home, HomeError
from .parts import Parts, open_parts
from .seed_engine import Engine

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_engine(config: Config, home: Home) -> AsyncIterator[Engine]:
    """An engine over the node's own cache. Raises `ConfigError`."""
    with ExitStack() as stack:
        parts = _open_parts(config, home, stack)
        database = Database(None)
        stack.callback(database.close)
        memory = AnswerCache(database, SqliteBlocks(database), peer=parts.peer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parts.answers.run)
            nursery.start_soon(memory.run)
            nursery.start_soon(parts.ledger.run)
            yield Engine(parts, memory, nursery, config.cache)
            nursery.cancel_scope.cancel()


def _open_parts(config: Config, home: Home, stack: ExitStack) -> Parts:
    """The parts without their providers, which are built when they are asked.

    Where the node's folder cannot be used the answers are kept for as long as this lives.
    """
    local_hf = dataclasses.replace(config.local_hf, model="", embedding_model="")
    bare = dataclasses.replace(config, providers=(), local_hf=local_hf)
    try:
        home.make_identity()
        return stack.enter_context(open_parts(bare, home, child_environment()))
    except (HomeError, OSError) as error:
        logger.warning("answers are not kept: %s", error)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="promptmesh-"))
    other = Home(Path(folder))
    other.make_identity()
    return stack.enter_context(open_parts(bare, other, child_environment()))
