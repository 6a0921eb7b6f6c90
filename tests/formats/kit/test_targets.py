"""Names that select exactly the adapted modules."""

from __future__ import annotations

from typing import Any

import pytest

from loraformat.formats.kit.targets import target_names
from loraformat.model.adapter import AdapterConfig

MODULES = ["a.q", "b.q", "b.k"]


@pytest.mark.parametrize(
    ("claimed", "raw"),
    [
        (("q",), {}),
        (("q", "k", "v"), {}),
        (".*", {}),
        (None, {}),
        ((), {}),
        (("q", "k"), {"layers_to_transform": [1]}),
        (("q", "k"), {"exclude_modules": ["a.q"]}),
    ],
)
def test_full_paths_where_the_claim_is_not_exact(claimed: Any, raw: dict[str, Any]) -> None:
    assert target_names(AdapterConfig(targets=claimed, raw=raw), MODULES) == ["a.q", "b.k", "b.q"]


def test_an_exact_claim_is_kept_without_repetition() -> None:
    assert target_names(AdapterConfig(targets=("q", "b.k", "q")), MODULES) == ["b.k", "q"]
