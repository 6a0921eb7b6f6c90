"""What must be true of a source archive and of wheels before others get them."""

from __future__ import annotations

import email
import hashlib
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

from artifacts import Failed, run, tracked, version

KERNEL = "loraformat/arithmetic/_kernel.so"
# Platforms that PyPI takes; `linux_x86_64` is not among them.
_PLATFORMS = re.compile(r"any|manylinux\w+|musllinux\w+|macosx_\w+|win_amd64")
# The first bytes of a library by what the platform of the tag begins and ends with.
_LIBRARIES = {
    ("manylinux", "x86_64"): (b"\x7fELF\x02\x01", 18, b"\x3e\x00"),
    ("manylinux", "aarch64"): (b"\x7fELF\x02\x01", 18, b"\xb7\x00"),
    ("musllinux", "x86_64"): (b"\x7fELF\x02\x01", 18, b"\x3e\x00"),
    ("musllinux", "aarch64"): (b"\x7fELF\x02\x01", 18, b"\xb7\x00"),
    ("macosx", "x86_64"): (b"\xcf\xfa\xed\xfe", 4, b"\x07\x00\x00\x01"),
    ("macosx", "arm64"): (b"\xcf\xfa\xed\xfe", 4, b"\x0c\x00\x00\x01"),
    ("win", "amd64"): (b"MZ", 0, b"MZ"),
}
_LINKS = re.compile(r"\]\((?![a-z]+:|#)([^)\s]+)\)")


def check_sdist(path: Path) -> None:
    """Raises: Failed: it is not the files of the repository and PKG-INFO, or a name in it leads elsewhere."""
    with tarfile.open(path) as archive:
        found = {member.name for member in archive.getmembers() if not member.isdir()}
    top = f"loraformat-{version()}/"
    if strays := sorted(name for name in found if not name.startswith(top)):
        raise Failed(f"{path.name}: outside of {top}: {', '.join(strays[:5])}")
    differ = {name.removeprefix(top) for name in found} ^ {*tracked(), "PKG-INFO"}
    if differ:
        raise Failed(f"{path.name}: not what git has: {', '.join(sorted(differ)[:10])}")


def check_wheel(path: Path) -> None:
    """Raises: Failed: a tag that PyPI refuses, files that are missing or too many, a wrong library, bad metadata."""
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}
    platforms = tags_of(path.name)
    if refused := [each for each in platforms if not _PLATFORMS.fullmatch(each)]:
        raise Failed(f"{path.name}: PyPI does not take {', '.join(refused)}")
    _check_names(path, set(files), has_library=platforms != ["any"])
    info = f"loraformat-{version()}.dist-info"
    _check_metadata(path, files[f"{info}/METADATA"].decode("utf-8"))
    _check_bill(path, files[f"{info}/sboms/loraformat.cdx.json"].decode("utf-8"), files.get(KERNEL))
    if KERNEL in files:
        _check_library(path, platforms[-1], files[KERNEL])


def _check_names(path: Path, found: set[str], *, has_library: bool) -> None:
    from runpy import run_path

    from artifacts import ROOT

    module_of = run_path(str(ROOT / "schemas" / "compile.py"))["module_of"]
    schemas = [Path(name).name for name in tracked() if re.fullmatch(r"schemas/[^/]+\.json", name)]
    validators = [f"loraformat/_validators/{module_of(name.removesuffix('.schema.json'))}.py" for name in schemas]
    info = f"loraformat-{version()}.dist-info"
    wanted = {name for name in tracked() if name.startswith("loraformat/") and not name.endswith((".c", ".h"))}
    wanted |= {f"loraformat/schemas/{name}" for name in schemas} | {*validators, "loraformat/_validators/__init__.py"}
    wanted |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    wanted |= {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE", f"{info}/sboms/loraformat.cdx.json"}
    wanted |= {KERNEL} if has_library else set()
    if found != wanted:
        more, less = sorted(found - wanted), sorted(wanted - found)
        raise Failed(f"{path.name}: too many: {', '.join(more[:5]) or '-'}; missing: {', '.join(less[:5]) or '-'}")


def _check_metadata(path: Path, text: str) -> None:
    metadata = email.message_from_string(text)
    for field in ("Summary", "License-Expression", "Keywords", "Maintainer", "Requires-Python", "Project-URL"):
        if not metadata[field]:
            raise Failed(f"{path.name}: METADATA has no {field}")
    if links := _LINKS.findall(str(metadata.get_payload())):
        raise Failed(f"{path.name}: links that lead nowhere on PyPI: {', '.join(links[:5])}")


def _check_bill(path: Path, text: str, library: bytes | None) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise Failed(f"{path.name}: the bill of materials is not CycloneDX 1.6: {error}")
    stated = [each["hashes"][0]["content"] for each in json.loads(text)["components"] if each["type"] == "file"]
    actual = [] if library is None else [hashlib.sha256(library).hexdigest()]
    if stated != actual:
        raise Failed(f"{path.name}: the bill of materials is about another library")


def _check_library(path: Path, platform: str, library: bytes) -> None:
    begin, offset, machine = next(
        value
        for (system, processor), value in _LIBRARIES.items()
        if platform.startswith(system) and platform.endswith(processor)
    )
    if not library.startswith(begin) or library[offset : offset + len(machine)] != machine:
        raise Failed(f"{path.name}: the library is not one for {platform}")
    if b"loraformat_kernel_version" not in library:
        raise Failed(f"{path.name}: the library lacks our functions")
    for folder in (b"/tmp", b"/home", b"/root", b"/Users", str(Path.cwd()).encode()):
        if folder in library:
            raise Failed(f"{path.name}: the library names a folder of the machine that built it: {folder.decode()}")


def check_set(paths: list[Path]) -> None:
    """Raises: Failed: they are not one source archive, one wheel without a library, and one for each platform."""
    found = sorted(_kind_of(path.name) for path in paths)
    wanted = sorted(["source archive", "wheel without a library", *map(" ".join, _LIBRARIES)])
    if found != wanted:
        raise Failed(f"expected {', '.join(wanted)}; found {', '.join(found)}")


def _kind_of(name: str) -> str:
    if not name.endswith(".whl"):
        return "source archive" if name == f"loraformat-{version()}.tar.gz" else name
    tag = tags_of(name)[-1]
    kinds = (" ".join(kind) for kind in _LIBRARIES if tag.startswith(kind[0]) and tag.endswith(kind[1]))
    return "wheel without a library" if tag == "any" else next(kinds, name)


def audit(path: Path) -> str:
    """What a Linux wheel is found to be. Raises: Failed: it needs a newer system than its tag says.

    auditwheel looks up the libraries of the machine that it runs on: for musl what the library needs is read here.
    """
    if "musllinux" in path.name:
        needed = needed_by(path)
        if needed - {"libc.so"}:
            raise Failed(f"{path.name}: needs {', '.join(sorted(needed))}")
        return f"needs {', '.join(sorted(needed)) or 'nothing'}"
    return needed_system(path.name, run("auditwheel", "show", path))


def needed_system(name: str, said: str) -> str:
    """The platform that auditwheel finds a wheel to need, from what it says.

    Raises: Failed: it says nothing, or that is newer than all that the name of the wheel promises.
    """
    found = re.search(r'consistent\s+with\s+the\s+following\s+platform\s+tag:\s+"(\w+)"', said)
    if found is None:
        raise Failed(f"{name}: {' '.join(said.split())}")
    machine, needed = _glibc(found[1])
    promised = [version for where, version in map(_glibc, tags_of(name)) if where == machine]
    if not needed or needed > max(promised, default=()):
        raise Failed(f"{name}: needs {found[1]}")
    return found[1]


def tags_of(name: str) -> list[str]:
    """The platforms in the name of a wheel."""
    return name.removesuffix(".whl").rpartition("-")[2].split(".")


def _glibc(tag: str) -> tuple[str, tuple[int, ...]]:
    """The machine of a platform tag and the oldest glibc that it asks for; no numbers where it names none."""
    found = re.fullmatch(r"manylinux_(\d+)_(\d+)_(\w+)", tag)
    return ("", ()) if found is None else (found[3], (int(found[1]), int(found[2])))


def needed_by(path: Path) -> set[str]:
    """The libraries that the library of a Linux wheel is linked with."""
    from elftools.elf.elffile import ELFFile

    with zipfile.ZipFile(path) as archive:
        dynamic = ELFFile(io.BytesIO(archive.read(KERNEL))).get_section_by_name(".dynamic")
    return {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
