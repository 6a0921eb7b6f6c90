"""Renaming of tensors (`--map`), and maps suggested from shapes and layer numbers (`--propose-map`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loraformat.diagnostics import show
from loraformat.errors import FormatError, UsageError
from loraformat.formats.kit.pairs.spelling import clean, pairs_of
from loraformat.matching import CONV1D
from loraformat.model.bundle import Bundle, TensorFile, Tensors
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.verbs import ProposedMap, RenamedTensor
from loraformat.model.tensors import LazyTensor

NameMap = tuple[str, str]
_LONGEST_NAME = 1000
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


@dataclass(frozen=True, slots=True)
class Renaming:
    """What a list of maps does to the names of a bundle.

    Attributes:
        table: every tensor whose name changes, sorted by its old name.
        idle: the patterns that match no name.
    """

    table: tuple[RenamedTensor, ...]
    idle: tuple[str, ...]


def renamed(bundle: Bundle, maps: Sequence[NameMap]) -> tuple[Bundle, Renaming]:
    """The files with other names of tensors: each pattern is replaced wherever it is found, one after the other.

    Args:
        maps: (Python expression, replacement), as for `re.sub`.

    Raises:
        UsageError (LF021): an expression or a replacement that Python does not take.
        FormatError (LF012): two tensors would have one name, or one would have none, or is longer than 1,000 letters.
    """
    if not maps:  # files that no format asks for stay unopened
        return bundle, Renaming((), ())
    rules = [(_compiled(pattern), new) for pattern, new in maps]
    used = [False] * len(rules)
    table: dict[str, str] = {}
    files = dict(bundle.files)
    for file in bundle.tensor_files():
        tensors = file.open()
        entries: dict[str, LazyTensor] = {}
        for name, tensor in tensors.entries.items():
            after = _name(name, rules, used, file.name)
            if after in entries:
                raise FormatError(f"--map gives two tensors the name {show(after, 200)}", where=file.name)
            entries[after] = tensor
            if after != name:
                table[name] = after
        files[file.name] = _with_entries(file, tensors, entries)
    idle = tuple(pattern for (pattern, _), was_used in zip(maps, used, strict=True) if not was_used)
    renamings = tuple(RenamedTensor(before=name, after=table[name]) for name in sorted(table))
    return replace(bundle, files=files), Renaming(renamings, idle)


def _with_entries(file: TensorFile, tensors: Tensors, entries: Mapping[str, LazyTensor]) -> TensorFile:
    changed = replace(tensors, entries=entries)
    return replace(file, open=lambda: changed)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"not a regular expression: {show(pattern, 200)} ({error})", where="--map") from error


def _name(name: str, rules: Sequence[tuple[re.Pattern[str], str]], used: list[bool], file: str) -> str:
    if len(name) > _LONGEST_NAME:
        raise FormatError(f"a name of {len(name)} characters: --map handles at most {_LONGEST_NAME}", where=file)
    for number, (pattern, new) in enumerate(rules):
        try:
            name, count = pattern.subn(new, name)
        except (re.error, IndexError) as error:
            raise UsageError(f"not a replacement: {show(new, 200)} ({error})", where="--map") from error
        used[number] = used[number] or count > 0
        if not name or len(name) > _LONGEST_NAME:
            raise FormatError(f"--map creates a name of {len(name)} characters", where=file)
    return name


def proposed(bundle: Bundle, base: Checkpoint) -> tuple[ProposedMap, ...]:
    """Maps from the modules of an adapter to those of a base, as far as their shapes and numbers leave one choice.

    Modules whose names differ in numbers alone belong together: `net.3.wq` and `net.4.wq`. Such a family fits a family
    of the base with the same numbers and, number by number, the same shapes.

    Raises: FormatError (LF012): no pair of factors is recognized.
    """
    files = bundle.tensor_files()
    modules = {module: pair for file in files for module, pair in pairs_of(file.open().entries)[0].items()}
    shapes = {module: _shape(*pair.factors) for module, pair in modules.items() if pair.a and pair.b}
    if not shapes:
        raise FormatError(
            "no factor pairs found, so there are no shapes to compare",
            where=bundle.uri,
            hint="first map the name endings to .lora_A and .lora_B",
        )
    layers = CONV1D.get(str(base.config.get("model_type")), ())
    stored = {name.removesuffix(".weight"): one.shape for name, one in base.tensors.items() if len(one.shape) == 2}
    # (out, in), however the base stores it.
    targets = {
        module: shape[::-1] if module.rpartition(".")[2] in layers else shape for module, shape in stored.items()
    }
    ours, theirs = _families(shapes), _families(targets)
    fits = {family: _fitting(members, theirs) for family, members in ours.items()}
    settled = _settled(fits)
    return tuple(
        ProposedMap(
            before=_pattern(family),
            after=_replacement(settled[family]) if family in settled else "",
            candidates=tuple(sorted(_shown(other) for other in fits[family])),
        )
        for family in sorted(ours)
    )


_Family = tuple[str, ...]
_Members = dict[tuple[int, ...], tuple[int, ...]]


def _shape(a: LazyTensor, b: LazyTensor) -> tuple[int, ...]:
    """(out, in) of the weight that two factors make: what is left of each without the rank, transposed or not."""
    shared = set(a.shape) & set(b.shape)
    if len(a.shape) != 2 or len(b.shape) != 2 or not shared:
        return ()
    rank = min(shared)
    (width, height) = (sides[1] if sides[0] == rank else sides[0] for sides in (a.shape, b.shape))
    return height, width


def _families(shapes: Mapping[str, tuple[int, ...]]) -> dict[_Family, _Members]:
    """Text between the numbers → numbers → shape."""
    found: dict[_Family, _Members] = {}
    for name, shape in shapes.items():
        path = clean(name)
        numbers = tuple(int(each) for each in _NUMBER.findall(path))
        found.setdefault(tuple(_NUMBER.split(path)), {})[numbers] = shape
    return found


def _fitting(ours: _Members, theirs: Mapping[_Family, _Members]) -> list[_Family]:
    """The families of the base with the same shapes; where there is none, with their transposes."""
    for step in (1, -1):
        found = [
            family
            for family, members in theirs.items()
            if all(members.get(numbers, ())[::step] == shape for numbers, shape in ours.items())
        ]
        if found:
            return found
    return []


def _settled(fits: Mapping[_Family, Sequence[_Family]]) -> dict[_Family, _Family]:
    """The families for which one other remains, after those are taken out that only one can have."""
    settled: dict[_Family, _Family] = {}
    left = {family: set(others) for family, others in fits.items()}
    while True:
        claims: dict[_Family, list[_Family]] = {}
        for family, others in left.items():
            if len(others) == 1:
                claims.setdefault(next(iter(others)), []).append(family)
        # What two families claim is left to the caller.
        unique = {families[0]: other for other, families in claims.items() if len(families) == 1}
        if not unique:
            return settled
        settled.update(unique)
        taken = set(unique.values())
        left = {family: others - taken for family, others in left.items() if family not in unique}


def _pattern(family: _Family) -> str:
    return "^" + r"(\d+)".join(re.escape(part) for part in family) + r"(?=\.|$)"


def _replacement(family: _Family) -> str:
    parts = [family[0]]
    for number, part in enumerate(family[1:], 1):
        parts += [rf"\g<{number}>", part]
    return "".join(parts)


def _shown(family: _Family) -> str:
    return "N".join(family)
