"""Makes loraformat/naming/transformers_names.json from the tables of the installed transformers.

Run as a script it writes the file; tests/naming compares it with the installed version where that is the same.
"""

from __future__ import annotations

import inspect
import json
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent.parent / "loraformat" / "naming" / "transformers_names.json"

# Rules of these classes depend on more than one name, or count: what they rename is matched by exact names only.
SPECIAL = ("GroupWeightRename", "Inkling2IndexOffsetWeightRename")


def rules() -> dict[str, list[dict[str, Any]]]:
    """Class name or model_type → its rules, in order."""
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("")
    cache = conversion_mapping._checkpoint_conversion_mapping_cache
    found = {name: [rule(transform) for transform in transforms] for name, transforms in sorted(cache.items())}
    return {name: entries for name, entries in found.items() if entries}


def rule(transform: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"find": pattern(transform.source_patterns), "to": list(transform.target_patterns)}
    if len(transform.source_patterns) > 1:
        entry["sources"] = len(transform.source_patterns)
    if type(transform).__name__ in SPECIAL:
        return {**entry, "op": "other"}
    operations = getattr(transform, "operations", None)
    return entry if operations is None else {**entry, "op": operation(operations, transform)}


def pattern(sources: list[str]) -> str:
    """One regular expression with a group for each source, and one for the number of an expert."""
    branches = []
    for number, source in sorted(enumerate(sources), key=lambda item: -len(item[1])):
        text = source.replace("*.", rf"(?P<e{number}>\d+)\.")
        text += r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", text) else ""
        branches.append(f"(?P<g{number}>{text})")
    return "|".join(branches)


def operation(operations: list[Any], transform: Any) -> str:
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in operations]
    if any(getattr(step, "num_shards_attribute", None) for step in operations):
        return "other"
    match steps:
        case [("MergeModulelist", 0)] if len(transform.source_patterns) == 1:
            return "experts"
        case [("MergeModulelist", 0), ("Concatenate", 1)]:
            return "experts"
        case [("Concatenate", 0)]:
            return "join"
        case [("Chunk", 0)]:
            return "split"
        case [("Transpose", _)]:
            return "transpose"
    return "other"


def models(known: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Architecture → the prefix of its bare model, and which rules apply to which part of it.

    Only architectures for which that is not simply the rules of its `model_type`, applied to everything.
    """
    from transformers.models.auto import modeling_auto

    tables = [getattr(modeling_auto, name) for name in dir(modeling_auto) if re.fullmatch(r"MODEL_.*MAPPING", name)]
    seen = set()
    for config_class in relevant_configs(known):
        for table in tables:
            try:
                classes = table[config_class]
            except (AttributeError, ImportError, KeyError, ValueError):
                continue
            for model_class in classes if isinstance(classes, tuple) else (classes,):
                if model_class is None or model_class in seen:
                    continue
                seen.add(model_class)
                entry = model(model_class, config_class, known)
                if entry is not None:
                    yield model_class.__name__, entry


def relevant_configs(known: set[str]) -> Iterator[type]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type in CONFIG_MAPPING:
        try:
            config_class = CONFIG_MAPPING[model_type]
        except (AttributeError, ImportError, KeyError):
            continue
        folder = Path(inspect.getfile(config_class)).parent
        text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("modeling_*.py"))
        inner = {part.model_type for part in config_class.sub_configs.values() if hasattr(part, "model_type")}
        classes = set(re.findall(r"^class (\w+)\(", text, re.MULTILINE))
        if known & {model_type, *inner, *classes} or "AutoModel.from_config" in text or "load_backbone(" in text:
            yield config_class


def model(model_class: Any, config_class: Any, known: set[str]) -> dict[str, Any] | None:
    import torch

    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(10)
    try:
        with torch.device("meta"):
            return described(model_class(small(config_class())), known)
    except Exception as error:  # noqa: BLE001 - the default config may be of no model, or a package may be missing
        print(f"{model_class.__name__}: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
        return by_class(model_class, config_class, known)
    finally:
        signal.alarm(0)


def by_class(model_class: Any, config_class: Any, known: set[str]) -> dict[str, Any] | None:
    """As `described`, without an instance: the rules of the class, and those of the bare model inside it."""
    if type(model_class).__name__ == "DummyObject":  # stands for a class whose package is not installed
        return None
    prefix, name, kind = model_class.base_model_prefix, model_class.__name__, config_class.model_type
    own = next((each for each in (name, kind) if each in known), None)
    bare = [each for each in bare_models(model_class) if each in known and each != name]
    parts = [[None, own]] if own else []
    parts += [["", bare[0]]] if bare and prefix else []
    if all(scope is None and each == kind for scope, each in parts):
        return None
    return {"prefix": prefix, "parts": parts}


def bare_models(model_class: Any) -> list[str]:
    """Classes that the constructor of a class makes for its bare model: `self.model = DetrModel(config)`."""
    source = inspect.getsource(model_class.__init__)
    return re.findall(rf"self\.{re.escape(model_class.base_model_prefix or '-')} = (\w+)[(.]", source)


def too_slow(*_: object) -> None:
    raise TimeoutError("takes too long")


def small(config: Any) -> Any:
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name in ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"):
            if part is not None and isinstance(getattr(part, name, None), int) and not hasattr(part, "layer_types"):
                setattr(part, name, min(2, getattr(part, name)))
    return config


def described(instance: Any, known: set[str]) -> dict[str, Any] | None:
    """As `get_model_conversion_mapping` walks a model: which sub-models bring rules, under which scope."""
    from transformers import PreTrainedModel

    prefix, parts = instance.base_model_prefix, []
    seen: dict[str, list[str]] = {}
    for path, part in instance.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        name, kind = type(part).__name__, part.config.model_type
        if covered(seen, name, path) or (name not in known and (covered(seen, kind, path) or kind not in known)):
            continue
        scope = None if path == "" else path.removeprefix(prefix).removeprefix(".")
        parts.append([scope, name if name in known else kind])
        seen.setdefault(name, []).append(path)
        if name not in known:
            seen.setdefault(kind, []).append(path)
    if all(scope is None and name == instance.config.model_type for scope, name in parts):
        return None
    entry = {"prefix": prefix, "parts": parts}
    text = getattr(instance.config, "text_config", None)
    return {**entry, "covers": [text.model_type]} if text is not None and text.model_type in known else entry


def covered(seen: dict[str, list[str]], name: str, path: str) -> bool:
    return any(above == "" or path.startswith(f"{above}.") for above in seen.get(name, ()))


def table() -> dict[str, Any]:
    import transformers

    known = rules()
    return {
        "source": f"transformers {transformers.__version__}, conversion_mapping.py",
        "rules": known,
        "models": dict(sorted(models(set(known)))),
    }


def dumped(content: dict[str, Any]) -> str:
    """One line for each name; names whose rules are those of an earlier one refer to it."""
    first: dict[str, str] = {}
    known = {}
    for name, entries in content["rules"].items():
        text = json.dumps(entries)
        known[name] = first.get(text, entries)
        first.setdefault(text, name)
    parts = {"rules": known, "models": content["models"]}
    groups = [
        f'"{group}": {{\n'
        + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in each.items())
        + "\n}"
        for group, each in parts.items()
    ]
    return "{\n" + ",\n".join([f'"source": {json.dumps(content["source"])}', *groups]) + "\n}"


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    TABLE.write_text(dumped(table()) + "\n", encoding="utf-8")
