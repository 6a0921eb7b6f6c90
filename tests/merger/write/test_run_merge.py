"""Merges that are read back, recorded, interrupted and continued."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from merger.checkpoints import adapter_folder, config, contents, save_base, weights
from safetensors.torch import load_file, save_file

from loraformat.containers import open_checkpoint, open_weights
from loraformat.errors import MergeError, StorageError
from loraformat.io import open_adapter
from loraformat.jobs.merge import merge
from loraformat.jobs.verify import verify
from loraformat.merger import (
    AdapterSource,
    Arithmetic,
    Inputs,
    Resources,
    Source,
    Trust,
    plan_merge,
    run_merge,
)
from loraformat.merger.verify import check
from loraformat.merger.write.journal import run_fingerprint
from loraformat.model.bundle import DIGESTS, MANIFEST
from loraformat.model.tensors import DType
from loraformat.schema import check as check_schema
from loraformat.storage import Copy, LocalStore
from loraformat.storage.local.store import LocalWriter

NAMES = [f"model.layers.{layer}.{kind}.weight" for layer in range(2) for kind in ("q_proj", "up_proj", "down_proj")]


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, str]:
    tensors = weights(dtype=torch.bfloat16)
    base = save_base(tmp_path / "base", tensors, config(), shards=3)
    return str(base), str(adapter_folder(tmp_path / "adapter", {name: tuple(tensors[name].shape) for name in NAMES}))


@pytest.mark.parametrize("mode", ["none", "sample", "full"])
def test_verified_or_not_the_bytes_are_the_same(inputs: tuple[str, str], tmp_path: Path, mode: str) -> None:
    base, change = inputs
    report = merge(base, [change], str(tmp_path / "a"), verify=mode)
    merge(base, [change], str(tmp_path / "b"), jobs=3, memory_nbytes=1)
    assert report.data.verified == mode
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_right_output_passes_the_full_check(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = weights(dtype=dtype)
    base = save_base(tmp_path / "base", tensors, config())
    change = adapter_folder(tmp_path / "adapter", {name: tuple(tensors[name].shape) for name in NAMES})
    merge(str(base), [str(change)], str(tmp_path / "out"), verify="full")


@pytest.mark.parametrize("name", [NAMES[1], "lm_head.weight"])
def test_a_wrong_byte_is_found_before_the_output_has_its_name(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    base, change = inputs
    real = check.check_output

    def damage(plan: object, opened: Inputs, output: LocalStore, **more: object) -> None:
        for path in Path(output.folder).glob("*.safetensors"):
            tensors = load_file(path)
            if name in tensors:
                tensors[name][65, 3] += 1
                save_file(tensors, path, metadata={"format": "pt"})
        real(plan, opened, LocalStore(output.folder), **more)

    monkeypatch.setattr("loraformat.merger.verify.check_output", damage)
    with pytest.raises(MergeError, match=name.replace(".", r"\.")):
        merge(base, [change], str(tmp_path / "out"), verify="full")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("row", "wrong"), [(2, 1.0), (2, float("inf")), (3, float("nan")), (3, -float("inf"))])
def test_what_is_not_finite_in_the_base_must_be_the_same_in_the_output(
    tmp_path: Path, dtype: torch.dtype, row: int, wrong: float
) -> None:
    """Without the hash of what was written: by the values alone."""
    tensors, name = weights(dtype=dtype), NAMES[0]
    tensors[name][2, 5], tensors[name][3, 5] = float("nan"), float("inf")
    base, out = save_base(tmp_path / "base", tensors, config()), tmp_path / "out"
    change = str(adapter_folder(tmp_path / "adapter", {name: (24, 24)}))
    adapters, checkpoint = [open_adapter(change).adapter], open_checkpoint(str(base))
    plan = plan_merge(checkpoint, adapters, [AdapterSource(change, "peft")])
    opened = Inputs(base=checkpoint, adapters=adapters)
    merge(str(base), [change], str(out))
    check.check_output(plan, opened, LocalStore(str(out)), full=True)
    merged = load_file(out / "model.safetensors")
    merged[name][row, 5] = wrong
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match=f"row {row}, column 5"):
        check.check_output(plan, opened, LocalStore(str(out)), full=True)


class Faulty(LocalStore):
    """A disk that gives other bits back than were written, in one place of one tensor."""

    def __init__(self, uri: str, tensor: str, byte: int) -> None:
        super().__init__(uri)
        self._tensor, self._byte = tensor, byte

    @contextmanager
    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> Iterator[LocalWriter]:
        with super().create(path, size) as writer:
            yield writer
        if path.endswith(".safetensors"):
            tensor = open_weights(LocalStore(self.folder), [path])[1].get(self._tensor)
            if tensor is not None:
                flip(Path(self.folder, path), tensor.span.offset + self._byte)


def flip(path: Path, offset: int) -> None:
    """Turn the lowest bit of a byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("name", [NAMES[0], NAMES[4], "lm_head.weight", "model.layers.1.norm.weight"])
@pytest.mark.parametrize("byte", [0, 47])
def test_one_wrong_bit_is_found_by_the_full_check(
    inputs: tuple[str, str], tmp_path: Path, name: str, byte: int, jobs: int
) -> None:
    """The lowest bit of bfloat16 is within what arithmetic may differ: its hash tells."""
    base, change = inputs
    opened = [open_adapter(change)]
    checkpoint = open_checkpoint(base)
    adapters = [one.adapter for one in opened]
    plan = plan_merge(checkpoint, adapters, [AdapterSource(change, "peft")])
    merged = Inputs(base=checkpoint, adapters=adapters)
    source = Source(LocalStore(change), tuple(opened[0].bundle.files))
    (tmp_path / "out").mkdir()
    output = Faulty(str(tmp_path / "out"), name, byte)
    with pytest.raises(MergeError, match=name.replace(".", r"\.")):
        run_merge(plan, merged, [source], output, Resources(jobs=jobs), Trust(verify="full"))


def test_the_full_check_reads_stacks_and_scalars(tmp_path: Path) -> None:
    tensors = weights(dtype=torch.bfloat16)
    more = {"stack": torch.arange(60.0).reshape(3, 4, 5), "scalar": torch.tensor(2.0), "empty": torch.zeros(3, 0)}
    base = save_base(tmp_path / "base", tensors | more, config())
    change = adapter_folder(tmp_path / "adapter", {name: tuple(tensors[name].shape) for name in NAMES})
    merge(str(base), [str(change)], str(tmp_path / "out"), verify="full", dtype="float16")
    merge(str(base), [str(change)], str(tmp_path / "same"), verify="full", rounding="stochastic", jobs=2)


def test_the_manifest_names_everything_and_nothing_of_the_machine(inputs: tuple[str, str], tmp_path: Path) -> None:
    base, change = inputs
    merge(base, [change], str(tmp_path / "out"), digests="sha256")
    text = (tmp_path / "out" / MANIFEST).read_text()
    manifest = json.loads(text)
    assert list(check_schema("manifest", manifest)) == []
    assert str(tmp_path) not in text
    files = set(os.listdir(tmp_path / "out")) - {MANIFEST, DIGESTS}
    assert {entry["name"] for entry in manifest["outputs"]} == files
    for entry in manifest["outputs"]:
        data = (tmp_path / "out" / entry["name"]).read_bytes()
        assert entry["nbytes"] == len(data)
        if not entry["name"].endswith(".safetensors"):
            assert entry["blake3"] == blake3(data).hexdigest()
    assert sorted(manifest["weights"]) == sorted(NAMES)
    (term,) = manifest["weights"][NAMES[0]]["terms"]
    assert (term["formula"], term["scale"]) == ("W + s*B@A", 2.0)
    shards = [path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")]
    assert not any(make(data).hexdigest() in text for data in shards for make in (hashlib.sha256, blake3))


def test_an_output_is_as_private_as_its_most_private_input(inputs: tuple[str, str], tmp_path: Path) -> None:
    os.chmod(Path(inputs[1], "adapter_model.safetensors"), 0o600)
    before = os.umask(0o022)
    try:
        report = merge(inputs[0], [inputs[1]], str(tmp_path / "out"))
    finally:
        os.umask(before)
    assert "LF815" in {one.code for one in report.findings}
    assert {path.stat().st_mode & 0o077 for path in [tmp_path / "out", *(tmp_path / "out").iterdir()]} == {0}


def test_the_manifest_tells_all_that_changes_bytes(inputs: tuple[str, str], tmp_path: Path) -> None:
    base, change = inputs
    options = {"rounding": "stochastic", "seed": 7}
    files = {"container": "safetensors", "dtype": "float16", "max_shard_nbytes": 20_000}
    merge(base, [f"{change}=0.5"], str(tmp_path / "out"), **options, **files)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["options"] == options | files | {"dtype": "F16"}
    assert [(one["strength"], one["alpha"], one["format"]) for one in manifest["adapters"]] == [(0.5, None, "peft")]


@pytest.mark.parametrize(
    "other",
    [
        {"rounding": "stochastic"},
        {"seed": 1},
        {"dtype": "float16"},
        {"container": "torch"},
        {"max_shard_nbytes": 9_000},
        {"strength": 0.5},
    ],
)
def test_options_that_change_bytes_change_what_resume_goes_on_from(
    inputs: tuple[str, str], other: dict[str, object]
) -> None:
    assert fingerprint(inputs) == fingerprint(inputs)
    assert fingerprint(inputs) != fingerprint(inputs, **other)


def fingerprint(inputs: tuple[str, str], *, dtype: str | None = None, strength: float = 1.0, **options: object) -> str:
    arithmetic = {key: options.pop(key) for key in ("rounding", "seed") if key in options}
    adapters = [open_adapter(inputs[1]).adapter]
    plan = plan_merge(
        open_checkpoint(inputs[0]),
        adapters,
        [AdapterSource(inputs[1], "peft", strength=strength)],
        dtype=DType.by_torch_name(dtype) if dtype else None,
        arithmetic=Arithmetic(**arithmetic),
        **options,
    )
    return run_fingerprint(plan, [], "1")


def command(base: Path, change: Path, out: Path, *more: str) -> list[str]:
    paths = [str(base), str(change), "-o", str(out)]
    return [sys.executable, "-m", "loraformat", "merge", *paths, "--jobs", "2", *more]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """Twelve shards that take a while, an adapter, and what the merge of them is."""
    folder = tmp_path_factory.mktemp("large")
    g = torch.Generator().manual_seed(0)
    shape = (1024, 2048)
    tensors = {f"model.layers.{n}.q_proj.weight": torch.randn(shape, generator=g).bfloat16() for n in range(12)}
    base = save_base(folder / "base", tensors, config(), shards=12)
    change = adapter_folder(folder / "adapter", dict.fromkeys(tensors, shape))
    merge(str(base), [str(change)], str(folder / "whole"))
    return base, change, contents(folder / "whole")


def left_beside(out: Path) -> list[Path]:
    return [path for path in out.parent.glob(f".{out.name}.loraformat-*.partial") if path.is_dir()]


def journaled(left: Path) -> list[str]:
    try:
        return list(json.loads((left / ".loraformat-journal.json").read_text())["files"])
    except (FileNotFoundError, json.JSONDecodeError):  # not there, or being written just now
        return []


@pytest.mark.parametrize(("number", "shards"), [(signal.SIGKILL, 1), (signal.SIGKILL, 6), (signal.SIGINT, 4)])
def test_a_merge_that_was_stopped_goes_on_to_the_same_bytes(
    large: tuple[Path, Path, dict[str, bytes]], tmp_path: Path, number: int, shards: int
) -> None:
    base, change, whole = large
    out = tmp_path / "out"
    more = () if number == signal.SIGKILL else ("--resume",)
    # Behind others, so that whoever waits for the journal sees it in time.
    with subprocess.Popen(["nice", "-n", "19", *command(base, change, out, *more)], stderr=subprocess.DEVNULL) as child:
        while child.poll() is None:
            if any(len(journaled(left)) >= shards for left in left_beside(out)):
                os.kill(child.pid, number)
                break
            os.sched_yield()
    (left,) = left_beside(out)
    assert not out.exists()
    done = {path.name: path.stat().st_ino for path in left.glob("*.safetensors")}
    complete = journaled(left)
    subprocess.run(command(base, change, out, "--resume"), check=True, capture_output=True)
    assert contents(out) == whole
    assert len(complete) >= shards
    assert all((out / name).stat().st_ino == done[name] for name in complete)
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_other_options_or_inputs_do_not_go_on_from_what_is_there(
    large: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    base, change, whole = large
    left = tmp_path / ".out.loraformat-0123abcd.partial"
    left.mkdir()
    (left / "stale.safetensors").write_bytes(b"x")
    journal = {"fingerprint": "other", "files": {"stale.safetensors": {}}}
    (left / ".loraformat-journal.json").write_text(json.dumps(journal))
    merge(str(base), [str(change)], str(tmp_path / "out"), resume=True)
    assert contents(tmp_path / "out") == whole


def _replaced(path: Path, data: bytes) -> None:
    """Another file of the same size under the same name, as an update of a model or an attacker leaves it."""
    other = path.with_name("new")
    other.write_bytes(data)
    os.replace(other, path)


@pytest.mark.parametrize(
    ("moment", "name"),
    [
        ("announce", "model.safetensors"),
        ("announce", "config.json"),
        ("announce", "generation_config.json"),
        ("progress", "model.safetensors"),
    ],
)
def test_a_base_that_is_swapped_after_planning_is_refused(tmp_path: Path, moment: str, name: str) -> None:
    """P4: what was planned from is what is merged, or nothing is written."""
    base = save_base(tmp_path / "base", weights(), {**config(), "vocab_size": 11})
    (base / "generation_config.json").write_text('{"top_k": 1}')
    change = adapter_folder(tmp_path / "adapter", dict.fromkeys(NAMES[:1], (24, 24)))
    swapped = bytearray((base / name).read_bytes())
    swapped[-2] ^= 1
    calls = []

    def swap(*_: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            _replaced(base / name, bytes(swapped))

    with pytest.raises(StorageError, match="changed while it was in use"):
        merge(str(base), [str(change)], str(tmp_path / "out"), verify="full", **{moment: swap})
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_swapped_after_planning_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    change = adapter_folder(tmp_path / "adapter", dict.fromkeys(NAMES[:1], (24, 24)))
    path = change / "adapter_model.safetensors"
    swapped = bytearray(path.read_bytes())
    swapped[-1] ^= 1
    with pytest.raises(StorageError, match="changed while it was in use"):
        merge(str(base), [str(change)], str(tmp_path / "out"), announce=lambda _: _replaced(path, bytes(swapped)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vocab.npz", "vocab.NPZ", "notes.gguf", "extra.bin", "notes.txt"])
def test_a_link_that_leaves_the_base_is_never_copied(inputs: tuple[str, str], tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"TOP SECRET")
    Path(inputs[0], name).symlink_to(tmp_path / "secret")
    with suppress(StorageError):
        merge(inputs[0], [inputs[1]], str(tmp_path / "out"))
    assert all(b"SECRET" not in path.read_bytes() for path in tmp_path.glob("out/*"))


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_a_name_that_is_not_utf_8_is_left_out_by_name(inputs: tuple[str, str], tmp_path: Path, where: str) -> None:
    folder = inputs[0] if where == "base" else inputs[1]
    with open(os.path.join(os.fsencode(folder), b"caf\xe9.txt"), "wb") as file:
        file.write(b"x")
    report = merge(inputs[0], [inputs[1]], str(tmp_path / "out"))
    assert verify(str(tmp_path / "out")).findings == ()
    assert ("LF802" in {one.code for one in report.findings}) == (where == "base")


def test_a_weight_file_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    os.rename(base / "model.safetensors", os.path.join(os.fsencode(base), b"caf\xe9.safetensors"))
    change = adapter_folder(tmp_path / "adapter", {NAMES[0]: (24, 24)})
    with pytest.raises(MergeError, match="not UTF-8"):
        merge(str(base), [str(change)], str(tmp_path / "out"))
