"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# Tiny models gain nothing from threads, and on a busy machine threads that wait for each other lose much.
# Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no failure.
settings.register_profile("here", deadline=None)
settings.load_profile("here")
