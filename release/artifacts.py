"""What is uploaded: a source archive, and made from it a wheel for each platform and one without a library."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compile_loops import TARGETS  # noqa: E402 - it lies beside this folder and is not installed

SUMS = "SHA256SUMS"
# The wheels, as hatch_build.py has them in LORAFORMAT_WHEEL.
KINDS = ("pure", *TARGETS)


class Failed(Exception):
    """Something that a release must not have."""


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints. Raises: Failed: it ends with an error, with what it printed."""
    arguments = [str(word) for word in command]
    # Python's own modules are not looked for in the folder that it runs in.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    own = {"PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONSAFEPATH": "1"}
    env = {**os.environ, **own, **environment}
    done = subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(arguments)}: exit {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def tracked() -> list[str]:
    """The files of the repository."""
    return run("git", "ls-files", "-z").rstrip("\0").split("\0")


def epoch() -> str:
    """When the last commit was made: the time of every file in an artifact, so that anybody can make the same bytes."""
    return run("git", "log", "-1", "--format=%ct").strip()


def sdist(folder: Path) -> Path:
    """The source archive, of the files as they are here."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT, SOURCE_DATE_EPOCH=epoch())
    (made,) = folder.glob("*.tar.gz")
    return made


def unpacked(archive: Path, folder: Path) -> Path:
    """The folder with the source that an archive holds."""
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (made,) = folder.iterdir()
    return made


def wheel(source: Path, folder: Path, kind: str, **environment: str) -> Path:
    """A wheel of unpacked source; `kind` as hatch_build.py has it in LORAFORMAT_WHEEL."""
    before = set(folder.glob("*.whl"))
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source)
    run(*command, cwd=source, SOURCE_DATE_EPOCH=epoch(), LORAFORMAT_WHEEL=kind, **environment)
    (made,) = set(folder.glob("*.whl")) - before
    return made


def wheels(source: Path, folder: Path) -> list[Path]:
    """The wheel without a library, and one for each platform."""
    return [wheel(source, folder, kind) for kind in KINDS]


def sums(paths: Iterable[Path]) -> str:
    """The SHA-256 of each file, as `sha256sum -c` reads them."""
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(paths))


def version() -> str:
    """That of the package."""
    text = (ROOT / "loraformat" / "_version.py").read_text(encoding="utf-8")
    return re.findall(r'__version__ = "(.+?)"', text)[0]


def release_of_changelog() -> tuple[str, str]:
    """The version and the date of the newest section; ("Unreleased", "") before a release."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    if found is None:
        raise Failed("CHANGELOG.md has no section `## [VERSION] - YYYY-MM-DD`")
    return found[1], found[2] or ""
