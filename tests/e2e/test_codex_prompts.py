"""Any text arrives at the model behind the real Codex as it is, and any answer comes back so."""

from collections.abc import Iterator

import pytest
from cli_matrix import Bench, bench
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench("codex", True, tmp_path_factory.mktemp("codex")) as made:
        yield made


@settings(max_examples=15)
@given(st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text))
def test_any_text_arrives_as_it_is(echo: Bench, prompt: str) -> None:
    got = echo.ask("echo", "streamed", prompt)
    assert echo.server is not None
    assert echo.server.of("echo")[-1].text == prompt
    assert (got.error, got.text) == (None, prompt)
