"""`--chaos-schedules N`: how many schedules each machine of the matrix draws (`make chaos`)."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-schedules", type=int, default=None, metavar="N")


def bounded(config: pytest.Config, schedules: int) -> settings:
    """Hypothesis settings for `schedules` in CI's time, or for as many as were asked for."""
    asked = config.getoption("--chaos-schedules", None)
    return settings(
        max_examples=asked or schedules,
        # The same schedules at each run of CI; others at each run of the long form.
        derandomize=asked is None,
        # A schedule that fails by a timeout would be tried again for minutes to make it smaller.
        phases=(Phase.explicit, Phase.generate),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
