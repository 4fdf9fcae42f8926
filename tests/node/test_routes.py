"""Who may ask, and which handler answers."""

import pytest

from promptmesh.node.routes import foreign


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:7411", None),
        ("localhost:7411", None),
        ("[::1]:7411", "http://localhost:3000"),
        ("app.localhost", "http://127.0.0.1:8080"),
    ],
)
def test_programs_of_this_machine_may_ask(host: str, origin: str | None) -> None:
    assert foreign(host, origin) is None


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("evil.example", None),
        ("evil.example:7411", "http://evil.example:7411"),
        ("127.0.0.1.evil.example", None),
        ("127.0.0.1", "https://evil.example"),
        ("127.0.0.1", "null"),
        ("", None),
        ("localhost.evil.example", None),
    ],
)
def test_pages_of_others_may_not(host: str, origin: str | None) -> None:
    assert foreign(host, origin)
