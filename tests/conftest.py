"""Settings of the whole test suite."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from interop_report import InteropReport

# The same examples in every run, and no verdict on speed: a busy machine is not a defect.
settings.register_profile(
    "promptmesh", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("promptmesh")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--interop-report", metavar="FILE", type=Path, help="see tests/interop_report.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--interop-report")
    if path is not None:
        config.pluginmanager.register(InteropReport(path))
