"""Hypothesis profiles, chosen by `HYPOTHESIS_PROFILE` (quick, ci, deep), and one thread per test process."""

import os

import torch
from hypothesis import HealthCheck, settings

SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.data_too_large)

settings.register_profile("quick", max_examples=3, deadline=None, derandomize=True, database=None)
settings.register_profile("ci", max_examples=6, deadline=None, derandomize=True, database=None)
settings.register_profile("deep", max_examples=300, deadline=None, suppress_health_check=SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)
