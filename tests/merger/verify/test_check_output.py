"""verify: every byte of a merged checkpoint is compared, or counted as not compared."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from merger.checkpoints import adapter_folder, config, save_base, weights
from safetensors.torch import load_file, save_file

from loraformat.containers import open_checkpoint
from loraformat.errors import ConfigError, LoraFormatError, MissingFile
from loraformat.jobs.merge import merge
from loraformat.jobs.verify import verify
from loraformat.model.bundle import DIGESTS, MANIFEST
from loraformat.schema import check as check_schema

NAMES = [f"model.layers.{layer}.{kind}.weight" for layer in range(2) for kind in ("q_proj", "up_proj", "down_proj")]


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, str]:
    tensors = weights(dtype=torch.bfloat16)
    base = save_base(tmp_path / "base", tensors, config(), shards=3)
    return str(base), str(adapter_folder(tmp_path / "adapter", {name: tuple(tensors[name].shape) for name in NAMES}))


def flip(path: Path, offset: int) -> None:
    """Turn the lowest bit of a byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("container", ["safetensors", "torch"])
@pytest.mark.parametrize("options", [{}, {"max_shard_nbytes": 9_000}, {"dtype": "float32"}])
def test_every_byte_of_every_file_has_a_digest(
    inputs: tuple[str, str], tmp_path: Path, container: str, options: dict[str, object]
) -> None:
    """Recomputed from the bytes on the disk by the library; the runs of a file join without gaps."""
    if container == "torch" and "max_shard_nbytes" in options:
        del options["max_shard_nbytes"]
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out), container=container, digests="sha256", jobs=3, memory_nbytes=1, **options)
    record = json.loads((out / DIGESTS).read_bytes())
    assert list(check_schema("digests", record)) == []
    assert record["files"].keys() == set(os.listdir(out)) - {MANIFEST, DIGESTS}
    for name, entry in record["files"].items():
        data, end = (out / name).read_bytes(), 0
        for offset, nbytes, digest in entry["runs"]:
            assert offset == end
            assert digest == blake3(data[offset : offset + nbytes]).hexdigest()
            end = offset + nbytes
        assert end == len(data) == entry["nbytes"]
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    read = [Path(inputs[1], name).read_bytes() for name in record["inputs"]["adapters"][0]]
    assert list(record["inputs"]["adapters"][0].values()) == [hashlib.sha256(data).hexdigest() for data in read]


@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_verify_finds_one_wrong_bit_wherever_it_is(inputs: tuple[str, str], tmp_path: Path, container: str) -> None:
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out), container=container)
    assert verify(str(out)).data.bytes_read == verify(str(out)).data.bytes_total > 0
    for path in sorted(out.iterdir()):
        whole = path.read_bytes()
        for offset in range(len(whole) % 173, len(whole), 173):
            flip(path, offset)
            assert not passes(out), (path.name, offset)
            path.write_bytes(whole)
    assert passes(out)


def test_verify_counts_what_it_cannot_compare(inputs: tuple[str, str], tmp_path: Path) -> None:
    """Without the list of digests: headers, computed weights and small files have others; copied tensors do not."""
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out))
    tensors = open_checkpoint(str(out)).tensors
    copied = sum(tensor.span.nbytes for name, tensor in tensors.items() if name not in NAMES)
    (out / DIGESTS).unlink()
    report = verify(str(out))
    assert report.findings == ()
    assert report.data.bytes_total - report.data.bytes_read == copied > 0
    against = verify(str(out), base=inputs[0], jobs=2)
    assert against.findings == ()
    assert against.data.bytes_read == against.data.bytes_total
    assert against.data.tensors_of_base == len(tensors) - len(NAMES)


def test_no_hash_leaves_copied_bytes_out(inputs: tuple[str, str], tmp_path: Path) -> None:
    merge(inputs[0], [inputs[1]], str(tmp_path / "out"), digests="none")
    merge(inputs[0], [inputs[1]], str(tmp_path / "whole"))
    (tmp_path / "whole" / DIGESTS).unlink()
    less, listed = verify(str(tmp_path / "out")), verify(str(tmp_path / "whole"))
    assert less.findings == ()
    assert less.data == listed.data
    assert less.data.bytes_read < less.data.bytes_total


@pytest.mark.parametrize("keep", [True, False])
def test_verify_finds_a_copied_tensor_that_is_not_the_base_s(
    inputs: tuple[str, str], tmp_path: Path, keep: bool
) -> None:
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out))
    if not keep:
        (out / DIGESTS).unlink()
    tensor = open_checkpoint(str(out)).tensors["model.layers.1.norm.weight"]
    flip(out / tensor.file, tensor.span.offset)
    found = {one.where for one in verify(str(out), base=inputs[0]).findings}
    assert "model.layers.1.norm.weight" in found
    assert {one.code for one in verify(str(out), base=inputs[0]).findings} == {"LF804"}


def test_verify_checks_the_records_of_a_torch_file_that_has_no_digests(inputs: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out), container="torch")
    (out / DIGESTS).unlink()
    assert verify(str(out)).findings == ()
    tensor = open_checkpoint(str(out)).tensors["model.layers.1.norm.weight"]
    flip(out / tensor.file, tensor.span.offset)
    assert tensor.file in {one.where for one in verify(str(out)).findings}


def test_a_missing_file_is_one_finding_and_its_bytes_were_not_compared(inputs: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = inputs
    merge(base, [adapter], str(tmp_path / "out"))
    gone = min((tmp_path / "out").glob("*.safetensors"))
    nbytes = gone.stat().st_size
    gone.unlink()
    report = verify(str(tmp_path / "out"))
    assert [(finding.location.file, finding.message) for finding in report.findings] == [
        (gone.name, "the file is missing")
    ]
    assert report.data.bytes_total - report.data.bytes_read == nbytes


def test_verify_names_what_was_added(inputs: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out))
    (out / "file").write_text("x")
    (out / "folder").mkdir()
    (out / "link").symlink_to("/etc/hostname")
    os.mkfifo(out / "pipe")
    (out / ".loraformat-0123.tmp").write_text("x")
    (out / ".hidden").write_text("x")
    (out / "config.json").rename(tmp_path / "config.json")
    (out / "config.json").symlink_to(tmp_path / "config.json")
    found = {one.where: one.message for one in verify(str(out)).findings}
    assert found.keys() >= {"file", "folder", "link", "pipe", ".loraformat-0123.tmp", ".hidden", "config.json"}
    assert "a FIFO" in found["pipe"]
    assert "a symbolic link" in found["config.json"]


def test_a_merged_folder_as_base_keeps_its_history_and_verifies(inputs: tuple[str, str], tmp_path: Path) -> None:
    base, change = inputs
    other = str(adapter_folder(tmp_path / "other", {NAMES[0]: (24, 24)}, seed=5))
    merge(base, [change], str(tmp_path / "one"), digests="sha256")
    second = merge(str(tmp_path / "one"), [other], str(tmp_path / "two"))
    third = merge(str(tmp_path / "two"), [change, other], str(tmp_path / "three"))
    assert "LF814" not in {one.code for one in second.findings}
    assert [one.message for one in third.findings if one.code == "LF814"] == [
        f"{each} was merged into this base before" for each in (change, other)
    ]
    manifests = [json.loads((tmp_path / name / MANIFEST).read_bytes()) for name in ("one", "two", "three")]
    first, after, last = ([adapter["digest"] for adapter in one["adapters"]] for one in manifests)
    assert [len(one["history"]) for one in manifests] == [0, 1, 2]
    assert [[each["digest"] for each in one["adapters"]] for one in manifests[2]["history"]] == [first, after]
    assert last == [*first, *after]
    for name in ("one", "two", "three"):
        assert verify(str(tmp_path / name)).findings == ()
        assert verify(str(tmp_path / name)).data.bytes_read == verify(str(tmp_path / name)).data.bytes_total


@pytest.mark.parametrize("change_of", ["cut", "edited", "no text", "large"])
def test_a_base_whose_manifest_is_damaged_is_not_one_without_history(
    inputs: tuple[str, str], tmp_path: Path, change_of: str
) -> None:
    base, change = inputs
    one, two = tmp_path / "one", tmp_path / "two"
    merge(base, [change], str(one))
    data = (one / MANIFEST).read_bytes()
    changed = {
        "cut": data[: len(data) // 2],
        "edited": data.replace(b'"strength": 1.0', b'"strength": 2.0'),
        "no text": b"\xff" * 100,
        "large": b"{",
    }
    (one / MANIFEST).write_bytes(changed[change_of])
    if change_of == "large":
        os.truncate(one / MANIFEST, 1 << 29)  # without blocks on the disk
    report = merge(str(one), [change], str(two))
    assert "LF819" in {each.code for each in report.findings}
    assert verify(str(two)).findings == ()
    assert "LF819" not in {each.code for each in merge(base, [change], str(tmp_path / "three")).findings}


def test_an_adapter_is_known_again_in_another_container(inputs: tuple[str, str], tmp_path: Path) -> None:
    base, change = inputs
    merge(base, [change], str(tmp_path / "one"))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "adapter_config.json").write_bytes(Path(change, "adapter_config.json").read_bytes())
    torch.save(load_file(Path(change, "adapter_model.safetensors")), copy / "adapter_model.bin")
    report = merge(str(tmp_path / "one"), [str(copy)], str(tmp_path / "two"))
    assert "LF814" in {one.code for one in report.findings}


def test_verify_accepts_what_was_written_and_names_what_was_changed(inputs: tuple[str, str], tmp_path: Path) -> None:
    base, change = inputs
    out = tmp_path / "out"
    merge(base, [change], str(out))
    assert verify(str(out)).findings == ()
    shard = next(path for path in sorted(out.glob("*.safetensors")) if NAMES[0] in load_file(path))
    tensors = load_file(shard)
    tensors[NAMES[0]][0, 0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    (out / "stray").write_text("x")
    (out / "tokenizer.json").unlink()
    found = {(one.where, one.code) for one in verify(str(out)).findings}
    assert {(NAMES[0], "LF804"), ("stray", "LF804"), ("tokenizer.json", "LF804")} <= found


@pytest.mark.parametrize("name", NAMES)
def test_verify_finds_one_wrong_bit_of_a_merged_weight(inputs: tuple[str, str], tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out))
    tensor = open_checkpoint(str(out)).tensors[name]
    flip(out / tensor.file, tensor.span.end - 1)
    assert [(one.where, one.code) for one in verify(str(out)).findings] == [(name, "LF804")]


def test_verify_does_not_believe_a_manifest_that_was_changed(inputs: tuple[str, str], tmp_path: Path) -> None:
    """Whichever byte it is: the folder never passes."""
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out))
    whole = (out / MANIFEST).read_bytes()
    for offset in range(0, len(whole), 97):
        flip(out / MANIFEST, offset)
        assert not passes(out), offset
        (out / MANIFEST).write_bytes(whole)
    (out / MANIFEST).write_bytes(whole.replace(b"\n", b"\r\n"))
    assert not passes(out)
    less = json.loads(whole)
    del less["weights"][NAMES[0]]
    (out / MANIFEST).write_text(json.dumps(less, indent=2, sort_keys=True) + "\n")
    assert [one.where for one in verify(str(out)).findings] == [MANIFEST]


def passes(out: Path) -> bool:
    try:
        return not verify(str(out)).findings
    except LoraFormatError:
        return False


def test_a_manifest_of_an_earlier_version_is_read(inputs: tuple[str, str], tmp_path: Path) -> None:
    """`accumulate` was an option; such folders are verified, and replaced with --overwrite."""
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out))
    manifest = json.loads((out / MANIFEST).read_bytes())
    assert "accumulate" not in manifest["options"]
    manifest["options"]["accumulate"] = "float64"
    del manifest["sha256"]
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (out / MANIFEST).write_text(text)
    assert not verify(str(out)).findings
    merge(inputs[0], [inputs[1]], str(out), overwrite=True)
    assert "accumulate" not in json.loads((out / MANIFEST).read_bytes())["options"]


def test_a_file_that_was_cut_short_is_named(inputs: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out))
    shard = min(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    assert shard.name in {one.where for one in verify(str(out)).findings}


def test_verify_needs_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        verify(str(tmp_path))
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ConfigError):
        verify(str(tmp_path))


def rewritten_digests(out: Path, runs_of: Callable[[list[list]], list[list]]) -> None:
    """The list of digests with other runs, and the digest of itself that belongs to them."""
    record = json.loads((out / DIGESTS).read_bytes())
    for entry in record["files"].values():
        entry["runs"] = runs_of(entry["runs"])
    del record["digest"]
    text = json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n"
    record["digest"] = blake3(text.encode()).hexdigest()
    (out / DIGESTS).write_text(json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n")


@pytest.mark.parametrize("kind", ["reversed", "twice", "overlapping"])
def test_digests_of_bytes_that_overlap_are_not_computed(inputs: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """A short list of them would ask for the same gigabytes again and again."""
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out))
    changes = {
        "reversed": lambda runs: runs[::-1],
        "twice": lambda runs: [*runs, *runs],
        "overlapping": lambda runs: [*runs, [0, sum(run[1] for run in runs), runs[0][2]]],
    }
    rewritten_digests(out, lambda runs: runs)
    assert passes(out)
    rewritten_digests(out, changes[kind])
    (found,) = verify(str(out)).findings
    assert (found.code, found.where) == ("LF804", DIGESTS)
    assert "overlap" in found.message


def test_weights_that_share_a_part_of_their_bytes_are_told(inputs: tuple[str, str], tmp_path: Path) -> None:
    """Many names of one large storage would be read as often."""
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out), container="torch")
    path = next(path for path in sorted(out.glob("*.bin")) if any(name in torch.load(path) for name in NAMES))
    tensors = torch.load(path)
    name = next(name for name in NAMES if name in tensors)
    whole = torch.zeros(100)
    torch.save({**tensors, name: whole[:50], "other": whole}, path)
    manifest = json.loads((out / MANIFEST).read_bytes())
    manifest["weights"]["other"] = manifest["weights"][name]
    (out / MANIFEST).write_text(json.dumps(manifest))
    assert any("shares some of its bytes" in found.message for found in verify(str(out)).findings)


def test_a_manifest_of_nothing_is_none(inputs: tuple[str, str], tmp_path: Path) -> None:
    """Nothing was compared then, which is not OK."""
    out = tmp_path / "out"
    merge(inputs[0], [inputs[1]], str(out))
    manifest = json.loads((out / MANIFEST).read_bytes())
    for path in out.iterdir():
        path.unlink()
    del manifest["sha256"]
    manifest |= {"outputs": [], "weights": {}}
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    with pytest.raises(ConfigError, match="outputs"):
        verify(str(out))
