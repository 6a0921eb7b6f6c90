"""The safetensors library as a second reader of what we wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping

from loraformat.errors import MergeError
from loraformat.merger.plan import ShardPlan
from loraformat.model.checkpoint import StoredTensor


def check_with_library(folder: str, shard: ShardPlan, tensors: Mapping[str, StoredTensor]) -> None:
    """Open a written file with `safetensors.safe_open` and compare names, dtypes and shapes with ours.

    Raises: MergeError (LF801): the library reads something else, or nothing.
    """
    from safetensors import SafetensorError, safe_open

    path = os.path.join(folder, shard.target)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            found = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except SafetensorError as error:
        raise MergeError(f"the safetensors library cannot read the file: {error}", where=shard.target) from error
    if found != {name: (tensor.dtype.safetensors, tensor.shape) for name, tensor in tensors.items()}:
        raise MergeError("the safetensors library reads other tensors than we do", where=shard.target)
