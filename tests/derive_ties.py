"""Makes loraformat/naming/transformers_ties.json from the classes of the installed transformers.

Run as a script it writes the file.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import warnings
from pathlib import Path

TABLE = Path(__file__).parent.parent / "loraformat" / "naming" / "transformers_ties.json"


def ties() -> dict[str, dict[str, str]]:
    """Class name → tied name → the name whose tensor it shares; classes that tie nothing are there with {}."""
    from transformers import PreTrainedModel, models

    found: dict[str, dict[str, str]] = {}
    for module in pkgutil.iter_modules(models.__path__):
        try:
            code = importlib.import_module(f"transformers.models.{module.name}.modeling_{module.name}")
        except ImportError:  # no such file, or a package that is not installed
            continue
        for name, each in vars(code).items():
            if isinstance(each, type) and issubclass(each, PreTrainedModel) and each.__module__ == code.__name__:
                keys = each._tied_weights_keys
                plain = isinstance(keys, dict) and not any(re.search(r"[\\()^$*]", k + v) for k, v in keys.items())
                if plain or not keys:
                    found[name] = dict(sorted((keys or {}).items()))
    return found


def table() -> dict[str, object]:
    """What the file holds: names of classes that tie nothing as one list, to keep it small."""
    import transformers

    found = ties()
    return {
        "transformers": transformers.__version__,
        "ties": {name: keys for name, keys in sorted(found.items()) if keys},
        "untied": sorted(name for name, keys in found.items() if not keys and not name.endswith("PreTrainedModel")),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    TABLE.write_text(json.dumps(table(), indent=0) + "\n", encoding="utf-8")
