"""What all tests share."""

from __future__ import annotations

import sys

import hypothesis
import pytest

# How long an example takes says something about the machine that it runs on, and nothing about the code.
hypothesis.settings.register_profile(
    "hostpassd", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("hostpassd")

LAST = 1500  # characters: the assertion, and what a person looks at first


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Says at once why a test failed: who has to end a run early sees what there was."""
    if report.failed:
        print(f"\n{report.nodeid} ({report.when}): {str(report.longrepr)[-LAST:]}", file=sys.__stdout__, flush=True)
