"""Merges in this process against the server of the tests, and what must be there afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s3_models import expected
from s3_server import S3Server

import loraformat

BASE, ADAPTER, OUT = "s3://models/base", "s3://models/adapter", "s3://models/out"
# What belongs to others: an object and an upload beside the output, and uploads whose keys begin like it.
NEIGHBORS = {"out-old/model-00001-of-00002.safetensors": b"old", "outer": b"outer"}


def merge(out: str = OUT, **options: Any) -> loraformat.Report:
    return loraformat.merge(BASE, [ADAPTER], out, **options)


def add_neighbors(s3: S3Server) -> None:
    for key, data in NEIGHBORS.items():
        s3.put("models", key, data)
    for number, key in enumerate((*NEIGHBORS, "out/of-somebody-else.bin")):
        upload = {"bucket": "models", "key": key, "parts": {}, "headers": {}, "time": 0.0}
        s3.multiparts[f"neighbor{number}"] = upload


def neighbors_are_there(s3: S3Server) -> bool:
    has_objects = all(s3.get("models", key) == data for key, data in NEIGHBORS.items())
    return has_objects and all(f"neighbor{number}" in s3.multiparts for number in range(len(NEIGHBORS) + 1))


def own_uploads(s3: S3Server) -> list[str]:
    return [one["key"] for name, one in s3.multiparts.items() if not name.startswith("neighbor")]


def visible(s3: S3Server, prefix: str = "out/") -> list[str]:
    return [key for key in s3.objects("models", prefix) if ".loraformat-" not in key]


def hidden(s3: S3Server, prefix: str = "out/") -> list[str]:
    return [key for key in s3.objects("models", prefix) if ".loraformat-" in key]


def output(s3: S3Server, prefix: str = "out/") -> dict[str, bytes]:
    return {key.removeprefix(prefix): s3.get("models", key) for key in s3.objects("models", prefix)}


def is_whole(s3: S3Server, models: Path) -> bool:
    """The merge, and nothing beside it."""
    return output(s3) == expected(models) and not own_uploads(s3)
