"""Each vendor's program in each case, through `generate_text` and `stream_text` (`cli_matrix`).

In every run by recordings of the real programs, and with the real Codex; all real ones with
`scripts/test --interop`.
"""

from collections.abc import Callable, Iterator

import pytest
from cli_matrix import ENDLESS, MATRIX, WAYS, Bench, Way, bench, expected
from cli_programs import KEY
from cli_real import benches

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", params=benches())
def asked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    """All cells of one program, asked at once."""
    name, real = request.param
    with bench(name, real, tmp_path_factory.mktemp(name)) as made:
        made.ask_all()
        yield made


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", MATRIX)
def test_each_cell(
    asked: Bench, case: str, way: Way, record_property: Callable[[str, object], None]
) -> None:
    if case not in asked.cases():
        pytest.fail(f"there is no recording of {case!r}: scripts/record-clis {asked.name}")
    wanted = expected(asked.name, case)
    if asked.server is not None:
        record_property("cell", (case, asked.name, asked.got[case, way].words()))
    assert asked.got[case, way] == wanted._replace(requests=1), asked.messages.get((case, way))


def test_no_hidden_requests(asked: Bench, record_property: Callable[[str, object], None]) -> None:
    if asked.server is None:
        pytest.skip("a recording asks no server")
    cases = [case for case in MATRIX if case not in ENDLESS]
    found = {case: len(asked.server.of(case)) / len(WAYS) for case in cases}
    assert {c: n for c, n in found.items() if n > expected(asked.name, c).requests} == {}
    more = ", ".join(f"{count:g} for `{case}`" for case, count in found.items() if count > 1)
    record_property(
        "interop", f"Requests of {asked.name} at the server beyond one: {more or 'none'}"
    )


def test_it_leaves_nothing_behind(asked: Bench) -> None:
    """But a program that is kept for the next request."""
    kept = set(asked.processes())
    assert len(kept) <= len(asked.left_behind())


def test_no_error_says_the_key(asked: Bench) -> None:
    assert asked.messages
    assert KEY not in "".join(asked.messages.values())
