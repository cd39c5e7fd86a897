"""What all tests share."""

from __future__ import annotations

import hypothesis

# How long an example takes says something about the machine that it runs on, and nothing about the code.
hypothesis.settings.register_profile(
    "hostpassd", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("hostpassd")
