"""The paths that the action is given, with their patterns expanded; each ends with a NUL byte.

As bash expands them with globstar and nullglob, which the bash of macOS does not have: `*` and `**` match nothing
hidden, a pattern that matches nothing vanishes, and links to folders match `**` in `folder/**/…`, but nothing below
them does.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterator

_STARS = re.compile(r"((?:.*?/)??)\*\*(?:/\*\*)*(?:/(.*))?", re.DOTALL)

_LEADS_ELSEWHERE = 0x2000_0000  # winnt.h, IsReparseTagNameSurrogate: a file of the cloud has a tag too


def main() -> None:
    """Write the paths of the variable LF_PATHS, one a line there."""
    lines = os.environ["LF_PATHS"].replace(os.sep, "/").split("\n")
    for line in filter(None, lines):
        for path in sorted(set(expanded(line))) if glob.has_magic(line) else [line]:
            sys.stdout.buffer.write(os.fsencode(path.replace(os.sep, "/")) + b"\0")


def expanded(pattern: str) -> list[str]:
    """What a pattern matches, in any order and some of it twice."""
    stars = _STARS.fullmatch(pattern)
    if not stars:
        return glob.glob(pattern)
    before, after = stars.groups()
    tops = glob.glob(before) if before else [""]
    if after is None:
        entries = [path for top in tops for each in folders(top) for path in glob.glob(f"{glob.escape(each)}*")]
        return entries + (tops if before else [])
    below = [each for top in tops for each in folders(top, with_links=bool(before))]
    return [path for each in below for path in expanded(glob.escape(each) + after)]


def folders(top: str, *, with_links: bool = False) -> Iterator[str]:
    """A folder and those below it, each with a slash at its end; no stranger's links or depth make this endless."""
    waiting = [top]
    while waiting:
        yield (folder := waiting.pop())
        try:
            inside = [each for each in os.scandir(folder or ".") if each.name[0] != "." and _is_folder(each)]
        except OSError:  # not readable, or a path that is too long
            continue
        yield from (f"{folder}{each.name}/" for each in inside if with_links and _is_link(each))
        waiting += [f"{folder}{each.name}/" for each in inside if not _is_link(each)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_link(entry: os.DirEntry[str]) -> bool:
    """Whether it leads elsewhere: a link, or what Windows has besides, such as a junction."""
    if entry.is_symlink() or os.name != "nt":
        return entry.is_symlink()
    try:
        return bool(entry.stat(follow_symlinks=False).st_reparse_tag & _LEADS_ELSEWHERE)  # type: ignore[attr-defined]
    except OSError:
        return True


if __name__ == "__main__":
    main()
