"""Settings of the whole test suite."""

from hypothesis import HealthCheck, settings

# The same examples in every run, and no verdict on speed: a busy machine is not a defect.
settings.register_profile(
    "promptmesh", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("promptmesh")
