"""The processor that computes: the CPU, or a CUDA device."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loraformat.errors import UsageError
from loraformat.extras import import_torch

if TYPE_CHECKING:
    import torch


def open_device(name: str) -> torch.device | None:
    """The device called "cuda" or "cuda:N"; None for "cpu".

    Raises: UsageError (LF021): the name does not mean a device, or this machine has none of that name.
    """
    if name == "cpu":
        return None
    if not re.fullmatch(r"cuda(:\d{1,3})?", name):
        raise UsageError(f"{name!r} is not a device, expected cpu, cuda or cuda:N", where="--device")
    library = import_torch(f"--device {name}")
    if not library.cuda.is_available():
        raise UsageError(f"{name} is not available: torch finds no CUDA device", where="--device", hint="use cpu")
    device: torch.device = library.device(name)
    count = library.cuda.device_count()
    if (device.index or 0) >= count:
        raise UsageError(f"{name} is not available: torch finds {count} CUDA devices", where="--device")
    return device
