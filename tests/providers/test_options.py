"""Typed settings from tables."""

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from promptmesh.providers.options import SettingsError, read_settings


@dataclass(frozen=True)
class OfADataclass:
    model: str
    batch: int = 16


class OfAStruct(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    batch: int = 16


@pytest.mark.parametrize("type_", [OfADataclass, OfAStruct])
def test_settings_without_a_name(type_: Any) -> None:
    assert read_settings(type_, {"model": "m"}, name="n") == type_(model="m", batch=16)
    with pytest.raises(SettingsError, match="no setting 'bacth'; did you mean 'batch'"):
        read_settings(type_, {"model": "m", "bacth": 3})
    with pytest.raises(SettingsError, match="model"):
        read_settings(type_, {})
