"""Nothing here reaches the network, and torch leaves the other cores to the other tests."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

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
