"""The part of the environment that a provider of each kind may see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from promptmesh.node.config import load_config
from promptmesh.node.config_providers import SUBSCRIPTION_KINDS
from promptmesh.node.ledger import Ledger
from promptmesh.node.node_database import NodeDatabase
from promptmesh.node.own_providers import DEFAULT_SLOTS, build_providers
from promptmesh.node.pricing import Purse
from promptmesh.providers import registry
from promptmesh.providers.base import Provider
from promptmesh.providers.echo import Echo, EchoSettings
from promptmesh.providers.variables import VARIABLES, environment_of

SECRETS = {name: f"{name} of a vendor" for names in VARIABLES.values() for name in names}
OTHERS = {"OPENAI_API_KEY": "o", "AWS_SECRET_ACCESS_KEY": "a", "PROMPTMESH_HOME": "/p", "CI": "1"}
BASE = {"PATH": "/bin", "HOME": "/root", "LC_ALL": "C.UTF-8", "no_proxy": "127.0.0.1"}


@pytest.mark.parametrize("kind", [*VARIABLES, "echo"])
def test_no_vendor_sees_the_variables_of_another(kind: str) -> None:
    own = {name: SECRETS[name] for name in VARIABLES.get(kind, ())}
    everything = {**SECRETS, **OTHERS, **BASE, "USER": ""}
    assert environment_of(kind, everything) == {**BASE, **own}


def test_each_kind_that_spends_a_subscription_has_variables_and_slots() -> None:
    assert frozenset(VARIABLES) == SUBSCRIPTION_KINDS
    assert frozenset(DEFAULT_SLOTS) >= SUBSCRIPTION_KINDS


@pytest.mark.parametrize("kind", sorted(SUBSCRIPTION_KINDS))
def test_it_is_handed_its_part_and_is_not_shared(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Mapping[str, Any]] = []

    def make(name: str, settings: Mapping[str, Any]) -> Provider:
        seen.append(settings)
        return Echo(EchoSettings(name=name))

    monkeypatch.setitem(registry._factories, kind, make)
    (tmp_path / "config.toml").write_text(
        f'[[providers]]\nkind = "{kind}"\n'
        f'[[providers]]\nkind = "{kind}"\nname = "two"\nshare = true\nenvironment = {{A = "b"}}\n'
        f'[[providers]]\nkind = "echo"\n'
    )
    config = load_config(tmp_path, environ={})
    given = {**SECRETS, **OTHERS, **BASE}
    database = NodeDatabase(None)
    purse = Purse(Ledger(database, peer="me"), peer="me")
    one, two, echo = build_providers(config, given, tmp_path, purse)
    database.close()
    assert [each["environment"] for each in seen] == [environment_of(kind, given)] * 2
    assert (one.paid, one.shared) == (True, False)
    assert (two.paid, two.shared) == (True, True)
    assert (echo.paid, echo.shared) == (False, True)
    assert one.admission.slots.load("own").slots == DEFAULT_SLOTS[kind]
