"""Each vendor's program in each case, through `generate_text` and `stream_text` (`cli_matrix`).

In every run by recordings of the real programs, and with the real Codex; all real ones with
`scripts/test --interop`.
"""

from collections.abc import Callable

import pytest
import trio
from cli_matrix import ENDLESS, WAYS, Bench, Way, as_well, bench, expected
from cli_programs import KEY
from cli_real import Run, cells, runs
from daemons import until

pytestmark = pytest.mark.e2e


class Asked:
    """The benches of the runs, each asked for all of its cells when it is first wanted."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._benches: dict[Run, Bench] = {}

    def __call__(self, run: Run) -> Bench:
        if run not in self._benches:
            with bench(run.name, run.real, self._folders.mktemp(run.name)) as made:
                made.ask_all(run.cases)
            self._benches[run] = made
        return self._benches[run]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return Asked(tmp_path_factory)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("run", "case"), list(cells()))
def test_each_cell(
    asked: Asked, run: Run, case: str, way: Way, record_property: Callable[[str, object], None]
) -> None:
    found = asked(run)
    wanted = [look(run.name, case)._replace(requests=1) for look in (expected, as_well)]
    got = found.got[case, way]
    if run.real:
        record_property("cell", (case, run.name, got.words()))
    assert got in wanted, found.messages.get((case, way))


@pytest.mark.parametrize("run", [run for run in runs() if run.values[0].real])
def test_no_hidden_requests(
    asked: Asked, run: Run, record_property: Callable[[str, object], None]
) -> None:
    server = asked(run).server
    assert server is not None
    cases = [case for case in run.cases if case not in ENDLESS]
    found = {case: len(server.of(case)) / len(WAYS) for case in cases}
    assert {c: n for c, n in found.items() if n > expected(run.name, c).requests} == {}
    more = ", ".join(f"{count:g} for `{case}`" for case, count in found.items() if count > 1)
    if more:
        record_property("interop", f"{run.name}, requests at the vendor's server: {more}")


@pytest.mark.parametrize("run", list(runs()))
async def test_it_leaves_nothing_behind(asked: Asked, run: Run) -> None:
    found = asked(run)

    async def gone() -> bool:
        return not await trio.to_thread.run_sync(found.processes) and not found.left_behind()

    await until(gone, f"nothing of {run.name} runs, or is in {found.folder}")


@pytest.mark.parametrize("run", list(runs()))
def test_no_error_says_the_key(asked: Asked, run: Run) -> None:
    messages = asked(run).messages
    assert messages
    assert KEY not in "".join(messages.values())
