"""A dry run refuses every output that the run itself would refuse, with the same words, and leaves it unchanged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import loraformat
from loraformat.errors import StorageError

FIXTURES = Path(__file__).parents[2] / "fixtures"
PLACES = {
    "base": "minigpt/base",
    "change": "minigpt/lora_adapter",
    "merged": "minigpt/lora_merged",
    "adapter": "good/peft/tiny-llama",
}

# Verb → what it reads, of PLACES; how it writes to a folder.
VERBS: dict[str, tuple[str, Callable[..., Any]]] = {
    "merge": ("base", lambda at, out, **how: loraformat.merge(at / "base", [at / "change"], out, alpha=16, **how)),
    "unmerge": (
        "merged",
        lambda at, out, **how: loraformat.unmerge(
            at / "merged", [at / "change"], out, base=at / "base", alpha=16, force=True, **how
        ),
    ),
    "convert": ("adapter", lambda at, out, **how: loraformat.convert(at / "adapter", out, to="native", **how)),
    "resize": ("adapter", lambda at, out, **how: loraformat.resize(at / "adapter", out, rank=1, **how)),
}


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Copies, which an error in the code could not protect."""
    for name, source in PLACES.items():
        shutil.copytree(FIXTURES / source, tmp_path / name)
    return tmp_path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refusal(write: Callable[..., Any], out: Path, **how: bool) -> str:
    with pytest.raises(StorageError) as refused:
        write(out, **how)
    return str(refused.value)


@pytest.mark.parametrize("verb", VERBS)
def test_an_input_as_the_output_is_refused(verb: str, places: Path) -> None:
    read, written_by = VERBS[verb]
    write, source = partial(written_by, places), places / read
    before = files_of(source)
    for out in (source, source / "inside"):
        assert refusal(write, out, dry_run=True, overwrite=True) == refusal(write, out, overwrite=True)
        assert "is, contains, or lies inside the input" in refusal(write, out, dry_run=True)
    assert files_of(source) == before


@pytest.mark.parametrize("verb", VERBS)
def test_an_existing_output_is_refused_unless_it_would_be_replaced(verb: str, places: Path) -> None:
    write, out = partial(VERBS[verb][1], places), places / "out"
    write(out)
    written = files_of(out)
    assert "replace it with --overwrite" in refusal(write, out, dry_run=True)
    assert refusal(write, out, dry_run=True) == refusal(write, out)
    write(out, dry_run=True, overwrite=True)
    (out / "notes.txt").write_text("mine")
    for overwrite in (True, False):
        found = refusal(write, out, dry_run=True, overwrite=overwrite)
        assert found == refusal(write, out, overwrite=overwrite)
        assert "holds notes.txt, which" in found
        assert "or remove the folder yourself" in found
        assert "replace it with --overwrite" not in found
    assert files_of(out) == {**written, "notes.txt": b"mine"}


def test_the_output_of_another_command_is_refused_without_advice_that_fails(places: Path) -> None:
    """A merge replaces what its manifest lists; the folder of an adapter has none."""
    merge, convert = (partial(VERBS[verb][1], places) for verb in ("merge", "convert"))
    out = shutil.copytree(places / "adapter", places / "out")
    unknown = "which no earlier run of this command wrote, so"
    assert f"{unknown} --overwrite would not replace it" in refusal(merge, out)
    assert f"{unknown} it is not replaced" in refusal(merge, out, overwrite=True)
    assert "which this run does not write, so it is not replaced" in refusal(convert, out, overwrite=True)
