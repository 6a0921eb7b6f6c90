"""The bar of a long run, on terminals of any width."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

CODE = """
from loraformat.report.terminal.text import progress
with progress("merging into /a/folder/with/a/rather/long/name/that/nobody/can/read/at/once") as advance:
    advance(500_000_000, 1_000_000_000)
"""


def drawn(width: int) -> list[str]:
    """The lines that appear on a terminal with so many columns, without their colors."""
    master, slave = os.openpty()
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    with subprocess.Popen([sys.executable, "-c", CODE], stderr=slave, env=environment) as child:
        os.close(slave)
        seen = b""
        try:
            while part := os.read(master, 1 << 16):
                seen += part
        except OSError:  # the other end is closed
            pass
    os.close(master)
    assert child.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode("utf-8"))
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("width", [30, 45, 60, 80, 200])
def test_the_bar_is_long_enough_to_be_one_and_fits(width: int) -> None:
    lines = drawn(width)
    assert lines
    for line in lines:
        assert 10 <= len(re.findall(r"[━╸╺]", line)) <= 40, line
        assert len(line.rstrip()) <= width


def test_a_wide_terminal_has_bytes_rate_and_time() -> None:
    assert re.search(r"500.0 MB/1.0 GB|0.5/1.0 GB", drawn(120)[-1])
    assert "merging into" in drawn(120)[-1]
