"""What a header says about the training, for people: never trusted for a scale, and private paths cut off.

Source: sd-scripts 48d368fa, library/train_util.py `ss_*`; Stability AI, ModelSpec 1.0.1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from loraformat import strict_json
from loraformat.errors import InvalidJson
from loraformat.model.bundle import Json

_TAGS_LIMIT = 16 << 20
_MOST_TAGS = 8
_LONGEST = 200
# What a header calls a fact, the first that is there; a fact is shown under its own word.
_FACTS = (
    ("title", ("modelspec.title", "ss_output_name")),
    ("base", ("ss_base_model_version", "modelspec.architecture")),
    ("checkpoint", ("ss_sd_model_name",)),
    ("base hash", ("ss_new_sd_model_hash", "ss_sd_model_hash")),
    ("resolution", ("modelspec.resolution", "ss_resolution")),
    ("network", ("ss_network_module",)),
    ("steps", ("ss_steps", "ss_max_train_steps")),
    ("images", ("ss_num_train_images",)),
    ("trigger words", ("modelspec.trigger_phrase",)),
    ("license", ("modelspec.license",)),
)
_PATH = re.compile(r"(?:[A-Za-z]:|~|\.{0,2})?[\\/].*|.*\\.*|.*/.*/.*")


def training_facts(raw: Mapping[str, Json]) -> dict[str, str]:
    """Fact → what the header says, each at most 200 characters; of a path only the last name.

    >>> training_facts({"ss_resolution": "(512, 512)", "ss_sd_model_name": "/home/jane/models/sd15.safetensors"})
    {'checkpoint': 'sd15.safetensors', 'resolution': '(512, 512)'}
    """
    found: dict[str, str] = {}
    for fact, names in _FACTS:
        text = next((raw[name] for name in names if raw.get(name)), None)
        if isinstance(text, str) and text.strip():
            found[fact] = without_folders(text.strip())[:_LONGEST]
    tags = raw.get("ss_tag_frequency")
    if "trigger words" not in found and isinstance(tags, str):
        found["tags"] = _most_used(tags)
    return found


def without_folders(text: str) -> str:
    """The last name of a path; any other text as it is, "owner/name" of the Hub included."""
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1] if _PATH.fullmatch(text) else text


def _most_used(text: str) -> str:
    """The most frequent tags of a training set: folder → tag → count."""
    try:
        value = strict_json.parse(text.encode("utf-8", "surrogatepass"), "ss_tag_frequency", limit=_TAGS_LIMIT)
    except InvalidJson:
        return "not valid JSON"
    counts: Counter[str] = Counter()
    for tag, count in _tags(value):
        counts[tag] += count
    return ", ".join(f"{tag[:40]} ({count})" for tag, count in counts.most_common(_MOST_TAGS)) or "none"


def _tags(value: Json) -> Iterator[tuple[str, int]]:
    for folder in value.values() if isinstance(value, dict) else ():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(count, int) and not isinstance(count, bool):
                yield tag.strip(), count
