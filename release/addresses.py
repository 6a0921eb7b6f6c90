"""Addresses and names that the project does not have yet, in one table, and the command that fills them in.

    python release/addresses.py                     what is missing, and where it stands
    python release/addresses.py --owner ACCOUNT     fill in the account that holds the repository, and take out of the
                                                    pages what only holds before the first release

`make release-check` names what is missing; with a tag it stops there. tests/ci/test_release.py holds
that no file beside those listed has one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Missing(NamedTuple):
    """Something that only whoever publishes can know.

    Attributes:
        what: in words.
        placeholder: what stands for it; empty if it is not a text in the repository.
        files: where.
    """

    what: str
    placeholder: str
    files: tuple[str, ...]


TABLE = (
    Missing(
        "the account on GitHub that holds the repository",
        "OWNER/loraformat",
        ("README.md", "docs/conf.py", "pyproject.toml"),
    ),
    Missing(
        "the project on PyPI, with this repository, release.yml and the environment `pypi` as its trusted publisher",
        "",
        (".github/workflows/release.yml",),
    ),
    Missing(
        "confirmation that the commit of pypa/gh-action-pypi-publish in release.yml is v1.13.0: "
        "git ls-remote https://github.com/pypa/gh-action-pypi-publish v1.13.0",
        "",
        (".github/workflows/release.yml",),
    ),
    Missing("the environment `pypi` of the repository, with a person who approves each release", "", ()),
    Missing(
        "private security advisories, switched on in the repository, which SECURITY.md tells reporters to use",
        "",
        ("SECURITY.md",),
    ),
)


# Around what a page says only until the first release: comments that no reader sees.
_BEFORE = re.compile(r"<!-- before the first release -->.*?<!-- end -->\n?", re.DOTALL)


def placed(root: Path = ROOT) -> dict[str, list[str]]:
    """Placeholder → the tracked files that have it, without this folder and its tests."""
    found: dict[str, list[str]] = {}
    for missing in TABLE:
        if missing.placeholder:
            command = ["git", "-C", str(root), "grep", "--name-only", "--fixed-strings", missing.placeholder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode > 1:  # 1: nothing found
                raise SystemExit(f"git grep: exit {done.returncode}: {done.stderr.strip()}")
            own = ("release/", "tests/", "CHANGELOG.md")
            found[missing.placeholder] = sorted(path for path in done.stdout.splitlines() if not path.startswith(own))
    return found


def fill_in(owner: str, root: Path = ROOT) -> list[str]:
    """Write the account into every file that has its placeholder; the files."""
    if not re.fullmatch(r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,38}", owner):
        raise SystemExit(f"not the name of an account: {owner!r}")
    ((placeholder, paths),) = placed(root).items()
    changed = sorted({*paths, *early(root)})
    for path in changed:
        text = (root / path).read_text(encoding="utf-8")
        text = _BEFORE.sub("", text).replace(placeholder, f"{owner}/loraformat")
        (root / path).write_text(text, encoding="utf-8")
    return changed


def early(root: Path = ROOT) -> list[str]:
    """The pages that say something about the time before the first release."""
    pages = (root / "README.md", *sorted((root / "docs").rglob("*.md")))
    found = (path for path in pages if path.is_file() and _BEFORE.search(path.read_text(encoding="utf-8")))
    return [path.relative_to(root).as_posix() for path in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owner", help="the account on GitHub")
    options = parser.parse_args()
    if options.owner:
        print("changed:", ", ".join(fill_in(options.owner)) or "nothing")
        return 0
    for missing in TABLE:
        where = placed().get(missing.placeholder, []) if missing.placeholder else missing.files
        if where or not missing.placeholder:
            print(f"missing: {missing.what}" + (f" ({', '.join(where)})" if where else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
