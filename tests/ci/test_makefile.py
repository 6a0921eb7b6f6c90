"""The Makefile: what somebody who types `make demo` for the first time sees."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_make_says_what_pip_does_before_it_does_it(target: str, tmp_path: Path) -> None:
    """As in a fresh checkout: `make -n` prints the commands that it would run."""
    command = ["make", "-n", "-C", str(ROOT), target, f"VENV={tmp_path / 'venv'}"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    said, install = told.index("pip, which shows what it downloads"), told.index("-m pip install")
    assert said < told.index("-m venv") < install
    (line,) = [line for line in told.splitlines() if "-m pip install" in line]
    assert not {"--quiet", "-q", "-qq"} & set(line.split())
