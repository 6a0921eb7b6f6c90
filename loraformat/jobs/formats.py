"""formats: what each format can read, write and not express, and the conversion matrix."""

from __future__ import annotations

from dataclasses import dataclass

from loraformat.formats import FORMATS
from loraformat.formats.kit.base import CONTENTS
from loraformat.naming.families import denoisers, family_named


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatRecord:
    """One format.

    Attributes:
        name, title: as in `--to peft`, and in words.
        writes: whether there is a writer.
        containers: of the weights that it writes, the default first.
        reads, holds: kinds of update that its reader makes and its writer can hold, see CONTENTS.
        loses: what every conversion into it loses, in words.
        families: the image and video models whose names it knows without a base; () for formats of other models.
        page: its page in the repository.
    """

    name: str
    title: str
    writes: bool
    containers: tuple[str, ...]
    reads: tuple[str, ...]
    holds: tuple[str, ...]
    loses: str
    families: tuple[str, ...]
    page: str


def formats() -> tuple[FormatRecord, ...]:
    """All formats, in the order of the table."""
    return tuple(
        FormatRecord(
            name=each.NAME,
            title=each.TITLE,
            writes=each.WRITES,
            containers=each.CONTAINERS,
            reads=each.READS,
            holds=each.HOLDS,
            loses=each.LOSES,
            families=_families_of(each.NAME),
            page=each.SPEC,
        )
        for each in FORMATS
    )


def _families_of(name: str) -> tuple[str, ...]:
    if name == "xlabs":  # trains FLUX.1 alone
        return (family_named("flux").title,)
    return tuple(each.title for each in denoisers()) if name in _IMAGES else ()


_IMAGES = ("diffusers", "kohya", "comfy", "lycoris")


# Formats whose names of weights are those of one kind of model, or which are read for one kind alone.
_WRITTEN_FOR_LANGUAGE = ("gguf", "litgpt")
_READ_FOR_LANGUAGE = ("mlx", "tinker", "gguf", "litgpt", "torchtune", "nemo")


def matrix() -> dict[str, dict[str, tuple[str, ...] | None]]:
    """Source format → target format → the kinds of update that this conversion refuses, in the order of CONTENTS.

    None where one format is of image models and the other of language models: it refuses all.
    """
    every = formats()
    return {
        source.name: {target.name: _refused(source, target) for target in every if target.writes} for source in every
    }


def _refused(source: FormatRecord, target: FormatRecord) -> tuple[str, ...] | None:
    if source.families and target.name in _WRITTEN_FOR_LANGUAGE:
        return None
    if target.families and source.name in _READ_FOR_LANGUAGE:
        return None
    return tuple(kind for kind in CONTENTS if kind in source.reads and kind not in target.holds)
