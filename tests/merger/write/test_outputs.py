"""Where a merge writes is behind protocols: a toy object store gives the same files as a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter_folder, config, save_base, weights
from object_store import Bucket
from toy_container import TOY

import loraformat
from loraformat.containers import CONTAINERS, open_weights
from loraformat.errors import LoraFormatError, StorageError
from loraformat.jobs.verify import verify
from loraformat.storage import LocalStore, schemes

SHAPES = {"model.layers.0.q_proj.weight": (24, 24), "model.layers.1.up_proj.weight": (130, 24)}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    made = Bucket()
    monkeypatch.setitem(schemes.SCHEMES, "toy", made.scheme())
    return made


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config(), shards=2)


@pytest.fixture
def change(tmp_path: Path) -> Path:
    return adapter_folder(tmp_path / "change", SHAPES)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("options", [{}, {"max_shard_nbytes": 9000}, {"container": "torch"}, {"digests": "none"}])
@pytest.mark.parametrize("jobs", [1, 4])
def test_an_object_store_gets_the_files_that_a_folder_gets(
    bucket: Bucket, base: Path, change: Path, tmp_path: Path, options: dict[str, object], jobs: int
) -> None:
    loraformat.merge(str(base), [str(change)], str(tmp_path / "out"), jobs=jobs, **options)  # type: ignore[arg-type]
    loraformat.merge(str(base), [str(change)], "toy://b/out", jobs=jobs, **options)  # type: ignore[arg-type]
    assert bucket.folder("toy://b/out") == contents(tmp_path / "out")
    assert bucket.log[-1][1] == "toy://b/out/loraformat.manifest.json"
    weights_done = max(n for n, (what, _, _) in enumerate(bucket.log) if what == "complete")
    assert weights_done < min(n for n, (what, _, _) in enumerate(bucket.log) if what == "put")


def test_what_is_in_the_store_is_copied_inside_it(bucket: Bucket, base: Path, change: Path) -> None:
    bucket.put_folder("toy://b/base", contents(base))
    loraformat.merge("toy://b/base", [str(change)], "toy://b/out", digests="none")
    copied = sum(nbytes for what, _, nbytes in bucket.log if what == "copy")
    edited = sum(rows * cols * 2 for rows, cols in SHAPES.values())
    total = sum(len(data) for name, data in bucket.folder("toy://b/out").items() if name.endswith(".safetensors"))
    assert copied == total - edited


def test_the_base_in_a_store_gives_the_merge_of_a_folder(
    bucket: Bucket, base: Path, change: Path, tmp_path: Path
) -> None:
    bucket.put_folder("toy://b/base", contents(base))
    loraformat.merge("toy://b/base", [str(change)], str(tmp_path / "of_store"))
    loraformat.merge(str(base), [str(change)], str(tmp_path / "of_folder"))
    found, wanted = contents(tmp_path / "of_store"), contents(tmp_path / "of_folder")
    assert {name for name in wanted if found[name] != wanted[name]} <= {"loraformat.manifest.json"}
    assert not verify(str(tmp_path / "of_store"), base="toy://b/base").findings


def test_a_merge_that_fails_leaves_no_object(
    bucket: Bucket, base: Path, change: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise StorageError("the check failed", where="toy")

    monkeypatch.setattr("loraformat.merger.verify.check_output", broken)
    with pytest.raises(StorageError):
        loraformat.merge(str(base), [str(change)], "toy://b/out")
    assert bucket.folder("toy://b/out") == {}


def test_an_output_is_not_written_where_nothing_can_be(base: Path, change: Path) -> None:
    with pytest.raises(LoraFormatError, match="outputs cannot be written there"):
        loraformat.merge(str(base), [str(change)], "az://container/out")
    with pytest.raises(LoraFormatError, match="ftp:// is not supported"):
        loraformat.merge(str(base), [str(change)], "ftp://host/out")


@pytest.mark.parametrize("options", [{}, {"max_shard_nbytes": 9000}, {"dtype": "float32"}])
def test_another_container_needs_its_line_in_the_table_alone(
    base: Path, change: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    monkeypatch.setitem(CONTAINERS, "toy", TOY)
    loraformat.merge(str(base), [str(change)], str(tmp_path / "out"), verify="full", **options)  # type: ignore[arg-type]
    toy = tmp_path / "toy"
    loraformat.merge(str(base), [str(change)], str(toy), container="toy", verify="full", **options)  # type: ignore[arg-type]
    assert sorted({path.suffix for path in toy.iterdir()}) == [".json", ".toy"]
    index = json.loads((toy / "model.toy.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    _, found = open_weights(LocalStore(str(toy)), names)
    _, wanted = open_weights(
        LocalStore(str(tmp_path / "out")), [p.name for p in (tmp_path / "out").glob("*.safetensors")]
    )
    assert found.keys() == wanted.keys() == index["weight_map"].keys()
    for name, tensor in found.items():
        assert tensor.span.offset % 64 == 0
        theirs = wanted[name]
        ours = LocalStore(str(toy)).read(tensor.file, *tensor.span)
        assert ours == LocalStore(str(tmp_path / "out")).read(theirs.file, *theirs.span)
