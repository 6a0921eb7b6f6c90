"""The processor that computes: the CPU, or a CUDA device."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loraformat.errors import ConfigError

if TYPE_CHECKING:
    import torch


def open_device(name: str) -> torch.device | None:
    """The device called "cuda" or "cuda:N"; None for "cpu".

    Raises: ConfigError (LF103): the name means no device, or this machine has none of that name.
    """
    if name == "cpu":
        return None
    if not re.fullmatch(r"cuda(:\d{1,3})?", name):
        raise ConfigError(f"{name!r} is no device, expected cpu, cuda or cuda:N", where="--device")
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"{name} is not there: torch finds no CUDA device", where="--device", hint="use cpu")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ConfigError(f"{name} is not there: torch finds {count} CUDA devices", where="--device")
    return device
