"""What differs between machines before any file is read: byte order, and the signals that end a process."""

from __future__ import annotations

import os
import signal
import sys

from loraformat.errors import UnsupportedMachine

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
ENDING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""The signals by which people and systems end a process. Windows has no hang-up; SIGBREAK is its Ctrl+Break."""


def require_little_endian(byteorder: str = sys.byteorder) -> None:
    """Raises: UnsupportedMachine (LF026): this machine is big-endian; weight files are little-endian."""
    if byteorder != "little":
        raise UnsupportedMachine(
            f"this machine is {byteorder}-endian; loraformat runs only on little-endian machines",
            hint="use x86-64 or arm64",
        )


def send(number: int) -> None:
    """Send a signal to this process, from any thread; the main thread handles it, also where it waits for the system.

    Windows knows no signals between processes: `os.kill` would end this one without its handlers.
    """
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        os.kill(os.getpid(), number)
