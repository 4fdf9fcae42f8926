"""Which configured providers share a limit, and what others see of one that is at it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio.testing

from promptmesh.node.config import load_config
from promptmesh.node.config_sections import Config
from promptmesh.node.config_values import ConfigError
from promptmesh.node.ledger import Ledger
from promptmesh.node.limiters import Limiters
from promptmesh.node.node_database import NodeDatabase
from promptmesh.node.own_providers import OwnProvider, build_providers
from promptmesh.node.pricing import Purse
from promptmesh.providers.base import GenerateRequest, Message, Text
from promptmesh.providers.rate_limits import Rates

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock


def config_of(tmp_path: Path, text: str, **environ: str) -> Config:
    (tmp_path / "config.toml").write_text(text)
    return load_config(tmp_path, environ=environ)


def test_who_has_the_same_key_has_the_same_limit(tmp_path: Path) -> None:
    table = '[[providers]]\nkind = "openai_compatible"\nbase_url = "http://h/v1"\nname = '
    text = (
        f'{table}"a"\napi_key_env = "ONE"\nrequests_per_minute = 9\nrequests_at_once = 2\n'
        f'{table}"b"\napi_key_env = "SAME"\nrequests_per_minute = 5\ntokens_per_minute = 100\n'
        f'{table}"c"\napi_key_env = "OTHER"\nwhen_limited = "refuse"\nrequests_per_minute = 7\n'
        f'{table}"d"\nrequests_per_minute = 1\n'
        f'{table}"e"\n{table}"f"\nmember_tokens_per_minute = 3\n'
    )
    config = config_of(tmp_path, text, ONE="k", SAME="k", OTHER="o")
    limiters = Limiters(config.providers)
    found = {table.name: limiters.of(table) for table in config.providers}
    assert found.pop("e") is None
    a, b, c, d, f = (throttle for throttle in found.values() if throttle is not None)
    assert a.limiter is b.limiter
    assert a.limiter.rates == Rates(5, 100, 2)
    assert (c.limiter.rates, c.refuses, a.refuses) == (Rates(7), True, False)
    assert d.limiter.rates == Rates(1)
    assert (f.limiter.rates, f.counts_tokens) == (Rates(), True)


@pytest.mark.parametrize(
    "line", ["requests_per_minute = 0", "tokens_per_minute = -1", 'when_limited = "never"']
)
def test_a_limit_that_makes_no_sense_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=line.split(" ", maxsplit=1)[0]):
        config_of(tmp_path, f'[[providers]]\nkind = "echo"\n{line}\n')


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[OwnProvider]:
    config = config_of(tmp_path, '[[providers]]\nkind = "echo"\nrequests_per_minute = 1\n')
    database = NodeDatabase(None)
    purse = Purse(Ledger(database, peer="me"), peer="me")
    (own,) = build_providers(config, {}, tmp_path, purse)
    yield own
    database.close()


async def test_others_see_that_it_is_at_its_limit(
    limited: OwnProvider, autojump_clock: Clock
) -> None:
    assert limited.load().wait is None
    message = Message(role="user", content=(Text(text="hello"),))
    async with limited.admission.open(GenerateRequest(model="echo", messages=(message,))) as answer:
        await answer.completion()
    for load in (limited.load(), limited.backend().load("member"), limited.advert().load):
        # No policy takes it for idle: it has as many as it takes now.
        assert load.running + load.waiting >= load.slots
    assert limited.load().wait == pytest.approx(60, abs=1)
    await trio.sleep(60)
    assert (limited.load().running, limited.load().wait) == (0, None)
