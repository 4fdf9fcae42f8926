"""Settings of the whole test suite."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers
from interop_report import InteropReport

# The same examples in every run, and no verdict on speed: a busy machine is not a defect.
settings.register_profile(
    "promptmesh", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("promptmesh")
# Whatever this process has loaded: it would also draw from the constants of those modules.
pytest.MonkeyPatch().setattr(
    providers, "_get_local_constants", lambda: providers._local_constants, raising=False
)

#: Short limits of the product: how long another process or a server may take to do its part.
LIMITS = (
    "child.KILL_GRACE",
    "child.LAST_WORDS",
    "codex_answer.INTERRUPT_GRACE",
    "copilot_session.ABORT_TIME",
    "http_reply.FINISH_TIME",
    "local_servers.TIME",
    "model_list.CHECK_TIME",
    "server_tokens.TIME",
)
#: Seconds.
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real clock nothing that a provider asks is late: a busy machine is no defect.

    A test of such a limit has a clock of its own, or sets the limit.
    """
    own_clock = {"autojump_clock", "mock_clock"} & {*request.fixturenames}
    if request.path.parent.name in ("node", "providers") and not own_clock:
        for limit in LIMITS:
            monkeypatch.setattr(f"promptmesh.providers.{limit}", PATIENCE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--interop-report", metavar="FILE", type=Path, help="see tests/interop_report.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--interop-report")
    if path is not None:
        config.pluginmanager.register(InteropReport(path))
