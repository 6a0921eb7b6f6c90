"""No test reaches the network, torch leaves the other cores to other tests, and SIGINT reaches the children."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# A suite that is started in the background ignores SIGINT, and so would every child.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("loraformat", deadline=None)
settings.load_profile("loraformat")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A `gpu` test is skipped, with a reason, where there is no device."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
