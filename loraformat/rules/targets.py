"""The table of programs that load adapters: what they refuse or silently ignore, by version.

The table is runtimes.json. Each line has the code of the rule that finds the feature, a verdict ("refuses" or
"ignores"), the message that the program gives or what it does instead, what helps, its source, and the versions that
it holds for (`from`, `before`). A feature without a line loads as it should, as far as is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

# In the table of a program's spellings: between how a text encoder is spelled and how the denoiser is.
ENCODER_AND_DENOISER = " + "


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that a runtime cannot do.

    Attributes:
        rule: code of the rule that looks for it.
        verdict: "refuses" or "ignores".
        message: what the runtime says, or does instead.
        since, before: first version it holds for, and the first that it does not; "" for no bound.
        allowed: modules that are no fault in spite of it.
        formats: names of the formats that it is about; () for all.
    """

    rule: str
    verdict: str
    message: str
    help: str
    source: str
    since: str = ""
    before: str = ""
    allowed: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SpellingLine:
    """What a runtime makes of one spelling of an image model's adapter; modules by their rules in the original.

    Attributes:
        refuses: its message, where it refuses the file; "" where it does not.
        ignores_all: whether it loads no module, without an error.
        refuses_modules: those for which it refuses the file → its message.
        refuses_parts: its message where blocks are missing or lack one of the modules in `needs`; "" where it loads
            what is there.
        ignores, misreads: modules that it leaves out, and those that it takes for others.
        ignores_biases: whether it leaves `diff_b` out.
    """

    refuses: str = ""
    ignores_all: bool = False
    refuses_modules: Mapping[str, str] = field(default_factory=dict)
    refuses_parts: str = ""
    needs: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    misreads: tuple[str, ...] = ()
    ignores_biases: bool = False


@dataclass(frozen=True, slots=True)
class Spellings:
    """What a runtime makes of the spellings of adapters of image models: a table that was made by running it, or read.

    Attributes:
        lines: family → spelling → line.
        encoders: family → text encoder → how it may be spelled + with which spelling of the denoiser; None where no
            text encoder is left out.
        encoder_without_output: its message for a text encoder in kohya's names without `out_proj`; "" for none.
        second_transformer: what becomes of updates of Wan's second transformer.
        ignores_header: whether it leaves `lora_adapter_metadata` out.
        doubts_dense: whether nobody tried dense deltas of weights.
    """

    lines: Mapping[str, Mapping[str, SpellingLine]]
    encoders: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None
    encoder_without_output: str = ""
    second_transformer: str = ""
    ignores_header: bool = False
    doubts_dense: bool = False

    def of(self, family: str, spelling: str) -> SpellingLine | None:
        """What is known of a spelling; None where nobody tried it."""
        return self.lines.get(family, {}).get(spelling)

    def reads_encoder(self, family: str, component: str, spellings: Sequence[str], beside: Sequence[str]) -> bool:
        """Whether updates of a text encoder are loaded, by how it and the denoiser beside it are spelled.

        True too where nobody tried the spelling of the denoiser.
        """
        if self.encoders is None or any(self.of(family, spelling) is None for spelling in beside):
            return True
        pairs = [each.split(ENCODER_AND_DENOISER) for each in self.encoders.get(family, {}).get(component, ())]
        firsts = {spelling.partition(" ")[0] for spelling in beside}
        known = {before for before, denoiser in pairs if not firsts or denoiser.partition(" ")[0] in firsts}
        return {spelling.partition(" ")[0] for spelling in spellings} <= known


@dataclass(frozen=True, slots=True)
class Target:
    """A runtime at a version.

    Attributes:
        name: as in `--target`.
        version: the one asked for, else the newest that the table was made from.
        reads: names of the formats that it loads.
        default_rank, most_rank: greatest rank without and with settings; None for no known limit.
        rank_option: how a greater rank is allowed; ranks: the values that it takes, () for any.
        modules: last names of the modules that it adapts; () for all.
        settings, kinds: for PEFT: setting or `peft_type` → version that brought it.
        convert: the command that writes what it reads.
        spellings: for a program that runs image models; None for others.
    """

    name: str
    title: str
    version: str
    reads: tuple[str, ...]
    lines: tuple[Line, ...]
    default_rank: int | None = None
    most_rank: int | None = None
    rank_option: str = ""
    ranks: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    settings: Mapping[str, str] | None = None
    kinds: Mapping[str, str] | None = None
    convert: str = ""
    spellings: Spellings | None = None

    @property
    def label(self) -> str:
        """Its title and version: vLLM 0.33.0."""
        return f"{self.title} {self.version}".rstrip()

    def lines_for(self, rule: str, format_name: str = "") -> Iterator[Line]:
        """What the table says about the feature that a rule looks for, at this version.

        Args: format_name: of the adapter; "" for lines about any.
        """
        own = key_of(self.version)
        for line in self.lines:
            is_late = bool(line.since) and own < key_of(line.since)
            is_early = bool(line.before) and own >= key_of(line.before)
            is_other = bool(format_name) and bool(line.formats) and format_name not in line.formats
            if line.rule == rule and not is_late and not is_early and not is_other:
                yield line

    def setting_for(self, rank: int) -> int:
        """The least value of `rank_option` that allows a rank."""
        return next((each for each in self.ranks if each >= rank), rank)

    def lacks(self, since: str | None) -> bool:
        """Whether something that came with version `since` is missing at this version."""
        return since is None or (bool(since) and key_of(self.version) < key_of(since))


def names() -> tuple[str, ...]:
    """The runtimes of the table."""
    return tuple(sorted(_table()))


def parse(text: str) -> Target:
    """`NAME`, `NAME==VERSION` or `NAME>=VERSION` (the least that is to be served) as a target.

    Raises: ValueError: no such runtime, or no version.
    """
    found = re.fullmatch(r"\s*([A-Za-z][\w.\-]*?)\s*(?:[=>]=\s*([0-9][0-9a-z.\-]{0,30}))?\s*", text)
    if found is None or found[1].lower() not in _table():
        raise ValueError(f"expected one of {', '.join(names())}, optionally with ==VERSION")
    return _target(found[1].lower(), found[2])


def key_of(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparison."""
    return tuple(int(part) for part in re.findall(r"\d{1,9}", version)[:3])


def _target(name: str, version: str | None) -> Target:
    row = _table()[name]
    return Target(
        name=name,
        title=row["title"],
        version=version or row["newest"],
        reads=tuple(row["reads"]),
        lines=tuple(_line(line) for line in row["lines"]),
        default_rank=row.get("default_rank"),
        most_rank=row.get("most_rank"),
        rank_option=row.get("rank_option", ""),
        ranks=tuple(row.get("ranks", ())),
        modules=tuple(row.get("targets", ())),
        settings=row.get("fields"),
        kinds=row.get("kinds"),
        convert=row.get("convert", ""),
        spellings=_spellings(row["spellings"], is_tried=version in (None, row["newest"]))
        if "spellings" in row
        else None,
    )


def _spellings(row: Mapping[str, Any], *, is_tried: bool) -> Spellings:
    """The table of a runtime's own file, or for each family the beginnings of spellings that it reads.

    Args: is_tried: whether the version is the one that the table is about; of another nothing is known.
    """
    if not is_tried:
        return Spellings({})
    table = _tried(row["file"]) if "file" in row else {}
    if "file" in row:
        lines = {
            name: {key: _spelling_line(line) for line in each["lines"] for key in line["spellings"]}
            for name, each in table["families"].items()
        }
    else:
        lines = {
            name: {
                f"{start} {tensors}": SpellingLine()
                for start in row["reads"].get(name, ())
                for tensors in row["tensors"]
            }
            for name in row["reads"]
        }
    encoders = {name: each["encoders"] for name, each in table["families"].items()} if table else None
    return Spellings(
        lines,
        encoders,
        encoder_without_output=table.get("encoder without out_proj", ""),
        second_transformer=row.get("transformer_2", ""),
        ignores_header=row.get("ignores header", False),
        doubts_dense=row.get("doubts dense", False),
    )


def _spelling_line(line: Mapping[str, Any]) -> SpellingLine:
    ignores = line.get("ignores", ())
    return SpellingLine(
        refuses=line.get("refuses", ""),
        ignores_all=ignores == "all",
        refuses_modules=line.get("refuses modules", {}),
        refuses_parts=line.get("refuses parts", ""),
        needs=tuple(line.get("needs", ())),
        ignores=() if ignores == "all" else tuple(ignores),
        misreads=tuple(line.get("misreads", ())),
        ignores_biases=line.get("ignores biases", False),
    )


@cache
def _tried(name: str) -> dict[str, Any]:
    from pathlib import Path

    table = json.loads((Path(__file__).with_name("runtimes") / name).read_text(encoding="utf-8"))
    assert isinstance(table, dict)
    return table


def _line(row: Mapping[str, Any]) -> Line:
    return Line(
        rule=row["rule"],
        verdict=row["verdict"],
        message=row["message"],
        help=row["help"],
        source=row["source"],
        since=row.get("from", ""),
        before=row.get("before", ""),
        allowed=tuple(row.get("allowed", ())),
        formats=tuple(row.get("formats", ())),
    )


@cache
def _table() -> dict[str, dict[str, Any]]:
    from pathlib import Path

    text = Path(__file__).with_name("runtimes.json").read_text(encoding="utf-8")
    table = json.loads(text)
    assert isinstance(table, dict)
    return table
