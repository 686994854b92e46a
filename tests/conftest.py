"""Settings that hold for the whole suite."""

from hypothesis import settings

# Derandomised: a failure here is a failure everywhere. No deadline: these machines are shared.
settings.register_profile("paceline", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("paceline")
