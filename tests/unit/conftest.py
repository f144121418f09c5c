"""Properties are tried without a look at the clock: a slow machine breaks none of them."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("weir", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("weir")
