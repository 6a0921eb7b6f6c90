"""`target_modules` of a config that is written: names that select the adapted modules."""

from __future__ import annotations

from collections.abc import Collection

from loraformat.model.adapter import AdapterConfig
from loraformat.model.patterns.keys import ends_of

# Fields of PEFT that make its target_modules select less than the names say.
_NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")


def target_names(config: AdapterConfig, modules: Collection[str]) -> list[str]:
    """The source's own names where they select every module and each selects one; else full paths. Sorted."""
    claimed = config.targets
    if isinstance(claimed, tuple) and not any(config.raw.get(name) for name in _NARROWING):
        chosen = {module: set(claimed).intersection(ends_of(module)) for module in modules}
        if all(chosen.values()) and set(claimed) == set().union(*chosen.values()):
            return sorted(set(claimed))
    return sorted(modules)
