"""The compiled loop, for those who check a merge's values from outside; see `loraformat.arithmetic`."""

from loraformat.arithmetic import Kernel, Packed, open_kernel, pack

__all__ = ["Kernel", "Packed", "open_kernel", "pack"]
