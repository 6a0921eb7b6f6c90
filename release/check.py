"""All that a release needs, shown without publishing anything: `make release-check`.

    python release/check.py [--tag v0.1.0] [--python python3.12 …] [--dist FOLDER]
    python release/check.py --published FOLDER      only look at files that others built

Builds the source archive from this checkout and all wheels from the archive, looks into them, installs them into fresh
environments, and leaves them with their hashes in dist/. A tag, from the option or from the variable TAG, makes it
stricter: it must be the version, the changelog must have its date, no address may be missing, and this machine must run
all libraries but those in libraries.ELSEWHERE.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import addresses
import artifacts
import contents
import libraries
from artifacts import ROOT, Failed, run

# Compiled a second time from nothing; the others take Zig minutes, since it compiles the C library of their system too.
TWICE = ("pure", "manylinux-x86_64", "macos-arm64")
# What needs its own system; the release workflow runs it there.
NOT_RUN = ("the macOS libraries", "Python on Windows", "Python on Alpine")


class Release:
    """One run: the folders, and what was made in them."""

    def __init__(self, dist: Path, scratch: Path, tag: str, pythons: list[str]) -> None:
        self.dist, self.scratch, self.tag, self.pythons = dist, scratch, tag, pythons
        self.sdist = Path()
        self.source = Path()
        self.wheels: list[Path] = []

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        """Name → what does it and says what it found."""
        return [
            ("version, tag and changelog", self.check_version),
            ("addresses", self.check_addresses),
            ("public surface", self.check_surface),
            ("source archive", self.build_sdist),
            ("wheels from the archive", self.build_wheels),
            ("the same bytes again", self.build_again),
            ("a wheel as pip makes it", self.build_as_users_do),
            ("what is in them", self.check_contents),
            ("auditwheel", self.check_platforms),
            ("libraries of other systems", self.check_libraries),
            ("installations", self.check_installations),
            ("hashes", self.write_sums),
        ]

    def check_version(self) -> str:
        """The tag is the version, the changelog has a date for it, and this machine can check it."""
        if self.tag and (missing := libraries.missing()):
            raise Failed("\n".join(missing))
        version = artifacts.version()
        newest, date = artifacts.release_of_changelog()
        if self.tag and (self.tag != f"v{version}" or newest != version or not date):
            raise Failed(
                f"tag {self.tag}, version {version}, newest section of CHANGELOG.md {newest} {date or 'without a date'}"
            )
        if newest not in ("Unreleased", version):
            raise Failed(f"version {version}, newest section of CHANGELOG.md {newest}")
        return f"{version}; CHANGELOG.md: {newest} {date}".rstrip()

    def check_addresses(self) -> str:
        """No address is missing if a tag is released; what no program can confirm is listed."""
        missing = [f"{name} in {', '.join(files)}" for name, files in addresses.placed().items() if files]
        missing += [f"what holds before the first release in {path}" for path in addresses.early()]
        if missing and self.tag:
            raise Failed(f"{'; '.join(missing)}: python release/addresses.py --owner ACCOUNT")
        confirm = [f"only the publisher can provide: {each.what}" for each in addresses.TABLE if not each.placeholder]
        return "\n".join([*(f"to be filled in before a release: {each}" for each in missing), *confirm])

    def check_surface(self) -> str:
        """The committed list is what the package has."""
        run(sys.executable, ROOT / "docs" / "surface.py", "--check")
        return "docs/surface.md is what the package has"

    def build_sdist(self) -> str:
        """The archive is made of what git has."""
        self.sdist = artifacts.sdist(self.dist)
        contents.check_sdist(self.sdist)
        self.source = artifacts.unpacked(self.sdist, self.scratch / "source")
        return f"{self.sdist.name}, {self.sdist.stat().st_size / 1e6:.1f} MB"

    def build_wheels(self) -> str:
        """One without a library, one for each platform."""
        self.wheels = artifacts.wheels(self.source, self.dist)
        return "\n".join(f"{path.name}, {path.stat().st_size / 1e6:.2f} MB" for path in self.wheels)

    def build_again(self) -> str:
        """Whoever builds the same commit elsewhere, with nothing from an earlier build, gets the same bytes."""
        again, elsewhere = self.scratch / "again", self.scratch / "other" / "place"
        again.mkdir()
        made = [artifacts.sdist(again)]
        source = artifacts.unpacked(self.sdist, elsewhere)
        made += [artifacts.wheel(source, again, kind, ZIG_GLOBAL_CACHE_DIR=str(self.scratch / "zig")) for kind in TWICE]
        differ = [each.name for each in made if each.read_bytes() != (self.dist / each.name).read_bytes()]
        if differ:
            raise Failed(f"other bytes: {', '.join(differ)}")
        return f"the archive and {', '.join(TWICE)}"

    def build_as_users_do(self) -> str:
        """pip makes a wheel of the archive, with the compiler of this machine and build requirements from the index."""
        folder = self.scratch / "by-pip"
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, self.sdist)
        (made,) = folder.iterdir()
        if not made.name.endswith("-any.whl"):
            run("auditwheel", "repair", "--wheel-dir", folder / "repaired", made)
            (repaired,) = (folder / "repaired").iterdir()
            contents.check_wheel(repaired)
            return f"{made.name}, by auditwheel repair {repaired.name}"
        return f"{made.name}: no compiler here"

    def check_contents(self) -> str:
        """PyPI takes them, nothing is missing, and nothing strays into them."""
        for path in self.wheels:
            contents.check_wheel(path)
        run("twine", "check", "--strict", self.sdist, *self.wheels)
        run("check-wheel-contents", *self.wheels)
        return "twine check --strict, check-wheel-contents, names of all files, metadata, bills of materials"

    def check_platforms(self) -> str:
        """Linux wheels need no newer system than their tags say."""
        linux = [path for path in self.wheels if "linux" in path.name]
        return "\n".join(f"{path.name}: {contents.audit(path)}" for path in linux)

    def check_libraries(self) -> str:
        """Each library gives the bytes of the library of this machine, where this machine can run it."""
        with_library = [(kind, path) for kind, path in zip(artifacts.KINDS, self.wheels, strict=True) if kind != "pure"]
        return "\n".join(libraries.check(kind, path, self.scratch / "run" / kind) for kind, path in with_library)

    def check_installations(self) -> str:
        """Fresh environments of every Python at hand, from the wheel for this machine: the core alone, every verb."""
        wheels = [f"--wheel-from={self.dist}"]
        pythons = [f"--python={each}" for each in self.pythons]
        return run(sys.executable, ROOT / "tests" / "core_install.py", *wheels, *pythons).strip()

    def write_sums(self) -> str:
        """Of all that is uploaded."""
        (self.dist / artifacts.SUMS).write_text(artifacts.sums([self.sdist, *self.wheels]), encoding="ascii")
        return f"{self.dist / artifacts.SUMS}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", default=os.environ.get("TAG", ""), help="what is released: v and the version")
    parser.add_argument("--published", type=Path, help="a folder with the files that are about to be uploaded")
    parser.add_argument("--python", action="append", help="an interpreter; those on the PATH unless given")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="a folder, which is emptied first")
    options = parser.parse_args()
    if options.published is not None:
        return _check_published(options.published)
    shutil.rmtree(options.dist, ignore_errors=True)
    options.dist.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="loraformat-release-") as name:
        release = Release(options.dist.resolve(), Path(name), options.tag, options.python or [])
        began = time.monotonic()
        for title, step in release.steps():
            start = time.monotonic()
            try:
                said = step()
            except Failed as failed:
                print(f"FAILED {title}: {failed}", flush=True)
                return 1
            print(f"ok {time.monotonic() - start:6.1f} s  {title}\n" + _indented(said), flush=True)
    print(f"all passed in {time.monotonic() - began:.0f} s; not run here: {', '.join(NOT_RUN)}")
    return 0


def _check_published(folder: Path) -> int:
    """The files that the machines of the release workflow built."""
    paths = sorted(path for path in folder.iterdir() if path.name != artifacts.SUMS)
    try:
        contents.check_set(paths)
        for path in paths:
            (contents.check_wheel if path.suffix == ".whl" else contents.check_sdist)(path)
        run("twine", "check", "--strict", *paths)
    except Failed as failed:
        print(f"FAILED {failed}", flush=True)
        return 1
    print(f"{len(paths)} files, as they must be")
    return 0


def _indented(text: str) -> str:
    return "\n".join(f"              {line}" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
