"""Optional libraries, imported where they are needed."""

from __future__ import annotations

from types import ModuleType

from loraformat.errors import MissingExtra


def import_ray(purpose: str) -> ModuleType:
    """The module ray.

    Args: purpose: what needs it, for the message.

    Raises: MissingExtra (LF029): Ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingExtra(f"{purpose} needs ray", hint="pip install 'loraformat[ray]'") from None
    found: ModuleType = ray
    return found


def import_torch(purpose: str) -> ModuleType:
    """The module torch.

    Args:
        purpose: what needs it, for the message: "--device cuda".

    Raises: MissingExtra (LF029): PyTorch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtra(f"{purpose} needs PyTorch", hint="pip install 'loraformat[torch]'") from None
    found: ModuleType = torch
    return found
