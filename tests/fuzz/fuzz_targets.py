"""What is fuzzed: a function of bytes for each reader. It may raise LoraFormatError; anything else is a bug.

Each reads, then uses what it read: a reader that accepts and a user that falls over is a bug too.
"""

from __future__ import annotations

import io
import json
import math
import struct
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import distributed_files
import hostile
import numpy as np
import torch
from containers import gguf_files
from quantization.encoders import ENCODERS, Encoder
from safetensors.torch import save

from loraformat import strict_yaml
from loraformat.budget import Budget
from loraformat.containers import strict_json
from loraformat.containers.bundles import open_tensors
from loraformat.containers.checkpoints import open_checkpoint
from loraformat.containers.distributed.tensors import open_distributed
from loraformat.containers.gguf.types import BY_CODE
from loraformat.containers.quantized import reference_rows
from loraformat.containers.torch_file.pickle_subset import read_pickle
from loraformat.diagnostics import show
from loraformat.errors import AdapterRefused, FormatError, LoraFormatError, UnsupportedUpdate, UsageError
from loraformat.jobs.convert import convert
from loraformat.jobs.inspect import View, inspect
from loraformat.jobs.merge import dequantize
from loraformat.jobs.validate import validate
from loraformat.jobs.verify import verify
from loraformat.merger.write.manifest import history_of, read_manifest
from loraformat.model.bundle import DIGESTS, MANIFEST, RawFile
from loraformat.model.patterns.keys import OutOfSteps, PatternKeys
from loraformat.model.patterns.matching import fullmatch, is_linear
from loraformat.report import FORMS, render_all
from loraformat.rules.metadata.vocabulary import read_vocabulary
from loraformat.storage import MemoryStore, TarStore

ROOT = Path(__file__).parent.parent.parent
FIXTURES = ROOT / "fixtures"
CONFIG = json.dumps(hostile.CONFIG).encode()


def safetensors_header(data: bytes) -> None:
    """The header, and every tensor that it lists."""
    store = MemoryStore({"x.safetensors": data})
    for name, lazy in open_tensors(store, "x.safetensors").entries.items():
        assert lazy.nbytes <= len(data)
        show(name)


def gguf_header(data: bytes) -> None:
    """The header, and the values of every tensor in a type that is read."""
    tensors = open_tensors(MemoryStore({"x.gguf": data}), "x.gguf")
    for lazy in tensors.entries.values():
        assert lazy.nbytes <= 32 * len(data)
        try:
            lazy.load()
        except UnsupportedUpdate:
            continue
    for key, value in tensors.extras.items():
        show(key)
        show(value)


def torch_zip(data: bytes) -> None:
    """The archive, and the values of every tensor in it."""
    tensors = open_tensors(MemoryStore({"x.pt": data}), "x.pt")
    for lazy in tensors.entries.values():
        assert lazy.numel <= 8 * len(data)
        if lazy.nbytes <= 1 << 16:
            lazy.torch()


def tar_archive(data: bytes) -> None:
    """The members of an archive; where the standard library reads it too, they have the same bytes."""
    store = TarStore(MemoryStore({"x.nemo": data}), "x.nemo")
    found = {name: store.read(name) for name in store.files()}
    assert sum(map(len, found.values())) <= len(data)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", errorlevel=2) as archive:
            wanted = {
                member.name.removeprefix("./"): archive.extractfile(member).read()
                for member in archive.getmembers()
                if member.isfile()
            }
    except (tarfile.TarError, OverflowError, UnicodeError, EOFError):
        return
    same = {name for name in found if name in wanted}
    assert {name: found[name] for name in same} == {name: wanted[name] for name in same}


def distributed(data: bytes) -> None:
    """`.metadata` and one file of shards, and the values of every tensor."""
    nbytes = struct.unpack_from("<H", data)[0] if len(data) > 1 else 0
    store = MemoryStore({".metadata": data[2 : 2 + nbytes], "__0_0.distcp": data[2 + nbytes :]})
    for lazy in open_distributed(store).entries.values():
        if lazy.nbytes <= 1 << 16:
            lazy.load()


def pickle_subset(data: bytes) -> None:
    """The pickle alone, which the archive's checks do not shield."""
    read_pickle(data, "x")


def strict_text(data: bytes) -> None:
    """What is accepted is what Python's reader says, and can be written again."""
    value = strict_json.parse(data, "x")
    assert value == json.loads(data)
    assert strict_json.parse(strict_json.dump(value), "x") == value


def index(data: bytes) -> None:
    """An index of shards, of which one exists."""
    shard = hostile.safetensors({"w": ("F32", [2], 8)})
    store = {"model.safetensors.index.json": data, "a.safetensors": shard}
    with _folder(store) as folder:
        assert set(open_checkpoint(str(folder)).files) <= {"a.safetensors"}


def tokenizer(data: bytes) -> None:
    """A tokenizer as data."""
    found = read_vocabulary(RawFile("tokenizer.json", len(data), lambda: data))
    assert found.rows is None or 0 <= found.rows <= 2**31


def expression(data: bytes) -> None:
    """A regular expression against names; it ends, and agrees with `re` where both know."""
    import re
    import warnings

    pattern = data.decode("utf-8", "replace")
    names = ("model.layers.0.self_attn.q_proj", "a" * 40, "")
    if not is_linear(pattern) or len(pattern) > 30:
        for name in names:
            fullmatch(pattern, name)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled = re.compile(pattern)
        except (re.error, OverflowError) as error:
            raise AssertionError(f"evaluated here, an error there: {pattern!r}") from error
    # Python's own matcher may take for ever on long names: short ones tell as much.
    for name in ("q", "a.q_proj", "aa", ""):
        found = fullmatch(pattern, name)
        assert found is None or found == (compiled.fullmatch(name) is not None), (pattern, name)


def yaml_text(data: bytes) -> None:
    """What is accepted is a value of JSON, which can be written and read again."""
    value = strict_yaml.parse(data, "x")
    assert strict_json.parse(strict_json.dump(value), "x") == value


def pattern_keys(data: bytes) -> None:
    """Keys of `rank_pattern`, one a line: the first that matches is the one that PEFT's expression matches."""
    import re
    import warnings

    keys = list(dict.fromkeys(data.decode("utf-8", "replace").split("\n")[:8]))
    table = PatternKeys(keys, Budget(200_000))
    for module in ("q", "a.q_proj", "m.a-b.q_proj", ""):
        try:
            found = table.first_match(module)
        except OutOfSteps:
            return
        if table.unread or any(len(key) > 30 for key in keys):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = next((key for key in keys if re.match(rf"(.*\.)?({key})$", module)), None)
        assert found == wanted, (keys, module, found, wanted)


def whole_folder(data: bytes) -> None:
    """A PEFT folder whose config and weights come from the bytes; validated, inspected and told in every form."""
    cut = struct.unpack_from("<H", data)[0] if len(data) >= 2 else 0
    files = {"adapter_config.json": data[2 : 2 + cut], "adapter_model.safetensors": data[2 + cut :]}
    with _folder(files) as folder:
        report = validate(str(folder), deep=len(data) < 4096)
        for form in FORMS:
            text = render_all([report], form)
            assert not set(text) & set("\x1b\x07\x9b\u202e")
        inspect(str(folder))


class _folder:  # noqa: N801 - used like a function
    """Files on disk, in one folder that is used again and again."""

    path: Path | None = None

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files

    def __enter__(self) -> Path:
        import tempfile

        if _folder.path is None:
            _folder.path = Path(tempfile.mkdtemp(prefix="loraformat-fuzz-"))
        for path in _folder.path.iterdir():
            path.unlink()
        for name, data in self.files.items():
            (_folder.path / name).write_bytes(data)
        return _folder.path

    def __exit__(self, *error: object) -> None:
        return None


def records(data: bytes) -> None:
    """What a merge writes about its output: as the manifest of a base, and both by verify."""
    cut = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
    files = {MANIFEST: data[4 : 4 + cut], DIGESTS: data[4 + cut :], "config.json": b"{}"}
    for adapter in (each for merge in history_of(read_manifest(MemoryStore(files))) for each in merge["adapters"]):
        assert len(adapter["digest"]) >= 64
    with _folder(files) as path:
        verify(str(path))


def quantized_base(data: bytes) -> None:
    """A base whose settings and weights come from the bytes: its codes are decoded by both readers, and agree."""
    cut = struct.unpack_from("<H", data)[0] if len(data) >= 2 else 0
    files = {"config.json": data[2 : 2 + cut], "model.safetensors": data[2 + cut :]}
    with _folder(files) as folder:
        base = open_checkpoint(str(folder))
        assert sum(weight.rows > 0 for weight in base.weights.values()) <= len(data)
        for name in base.quantized.weights if base.quantized is not None else ():
            weight = base.weights[name]
            assert base.quantized is not None
            assert math.prod(weight.shape) <= 4 * len(data)
            with np.errstate(all="ignore"):
                found = np.asarray(weight.read(0, weight.rows), np.float64)
                wanted = reference_rows(base.quantized, base.tensors[name], 0, weight.rows)
            assert np.array_equal(found, wanted, equal_nan=True), name
        try:
            dequantize(str(folder), f"{folder}-out", dry_run=True)
        except UsageError:
            assert base.quantized is None


_ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}


def image_adapter(data: bytes) -> None:
    """Names, shapes and metadata of an image adapter, as JSON: read, shown, judged and converted."""
    try:
        said = json.loads(data)
        metadata = {str(key): str(value) for key, value in dict(said.pop("__metadata__", {})).items()}
        sizes = {
            str(name): (dtype, [int(size) for size in shape], math.prod(map(int, shape)) * _ITEMSIZE[dtype])
            for name, (dtype, shape) in said.items()
        }
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return
    if not sizes or any(not 0 <= nbytes <= 1 << 14 for _, _, nbytes in sizes.values()):
        return
    numbers = b"\x00\x00\x80\x3f" * (sum(nbytes for *_, nbytes in sizes.values()) // 4 + 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lora.safetensors")
        path.write_bytes(
            hostile.safetensors(sizes, numbers[: sum(nbytes for *_, nbytes in sizes.values())], __metadata__=metadata)
        )
        report = validate(str(path))
        for form in FORMS:
            render_all([report], form)
        inspect(str(path), view=View(metadata=True))
        for target in ("diffusers", "kohya", "lycoris", "peft"):
            with suppress(AdapterRefused, FormatError):
                convert(path, Path(folder, target), to=target, partial=True, check_roundtrip=True)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        safetensors_header,
        gguf_header,
        torch_zip,
        tar_archive,
        distributed,
        pickle_subset,
        strict_text,
        index,
        tokenizer,
        expression,
        yaml_text,
        pattern_keys,
        quantized_base,
        records,
        whole_folder,
        image_adapter,
    )
}

TOKENS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b":",
        b",",
        b"null",
        b"true",
        b"-1",
        b"1e9",
        b"9" * 19,
        b"\\ud800",
        b"\x00",
        b"\x1b",
    ),
    *(
        b'"dtype"',
        b'"shape"',
        b'"data_offsets"',
        b'"F32"',
        b'"BF16"',
        b'"__metadata__"',
        b'"weight_map"',
        b'"a.safetensors"',
    ),
    *(b"\x80\x02", b"(", b"q\x00", b"h\x00", b"R", b"b", b"Q", b"u", b"s", b"t", b"]", b"}", b")", b".", b"\x8a\x08"),
    *(
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch\nFloatStorage\n",
        b"cos\nsystem\n",
    ),
    *(b"GGUF", b"general.alignment", b"general.type", b"\x09\x00\x00\x00", b"\x08\x00\x00\x00"),
    *(b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80"),
    *(b".*", b"(", b")+", b"|", b"{2,3}", b"[a-z]", b"\\d", b"(?:", b"^", b"$", b"*?", b"{0}", b"[^", b"\\"),
    *(b'"r":', b'"rank_pattern":', b'"lora_alpha":', b'"target_modules":', b'"LORA"', b'"LOHA"', b'"modules_to_save":'),
    *(b"%YAML 1.", b"---\n", b"- ", b": ", b"&a ", b"*a", b"!!int ", b"0x", b":59", b"\\U0001", b"\\.", b"\\-"),
    *(
        b'"bits":',
        b'"group_size":',
        b'"blocksize":',
        b'"quant_type":',
        b'"num_bits":',
        b'"weight_block_size":',
        b'"sym":',
    ),
    *(
        b'"I32"',
        b'"U8"',
        b'"F8_E4M3"',
        b'"F16"',
        b".qweight",
        b".g_idx",
        b".absmax",
        b".weight_scale",
        b".weight_packed",
    ),
    *(
        b"lora_unet_",
        b"lora_te1_",
        b"lycoris_",
        b"diffusion_model.",
        b"unet.",
        b"transformer.",
        b".alpha",
        b".dora_scale",
    ),
    *(b"double_blocks_0_img_attn_qkv", b".lora_mid.weight", b".lokr_w1", b".hada_t1", b".diff_b", b".default", b"_1_"),
    *(b'"lora_adapter_metadata":', b'"ss_tag_frequency":', b"unet.r", b"unet.alpha_pattern", b"[4, 4, 3, 3]", b"[0]"),
    *(b'"vocab":', b'"merges":', b'"model":', b'"added_tokens":', b'"id":', b'"content":', b'"normalizer":'),
)


# Inputs that are written here; the others come from the fixtures.
_WRITTEN: Mapping[str, list[bytes]] = {
    "yaml_text": [
        b"lora_r: 8\nlora_alpha: 16.0\nlora_query: true\nout_dir: 'a: b'\nlist: [1, 2.5e3, null]\n",
        b'%YAML 1.1\n---\na: 1:30:59\nb: 0x1F\nc: "\\u00e9\\n"\nd: |\n  text\n  more\n',
    ],
    "pattern_keys": [
        b"^m.a-b.q_proj\nq_proj\n.*q",
        b"m\\.a\\-b\\.q_proj$\n^q$\n(a|m)\\.q_proj",
        b"a.q_proj\na-b\\.[a-q]_proj",
    ],
    "index": [b'{"metadata": {"total_size": 8}, "weight_map": {"w": "a.safetensors"}}'],
    "expression": [
        rb".*\.(q|v)_proj",
        rb"(model\.)?layers\.\d+\.[a-z_]{2,9}",
        rb"(a|aa)+$",
        rb"[^.]+\.q_proj",
        rb"\w*?x{0,2}",
    ],
}


def _archive(form: int) -> bytes:
    """An archive with a long name, an empty member and one of two blocks."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=form) as archive:
        for name, data in (("./a.yaml", b"a: 1"), ("n" * 90 + ".ckpt", bytes(600)), ("d/e", b"")):
            info = tarfile.TarInfo(name * (2 if form != tarfile.USTAR_FORMAT and len(name) > 50 else 1))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def gguf_seeds() -> list[bytes]:
    """Files with settings of every type, and with tensors in every element type that has few bytes."""
    fields = [
        gguf_files.string("general.type", "model"),
        gguf_files.number("general.alignment", 32),
        gguf_files.array("x", gguf_files.U32, bytes(12), 3),
        gguf_files.array("y", gguf_files.STRING, gguf_files.text("ab") * 2, 2),
        *(gguf_files.field(f"k{code}", code, bytes(size)) for code, size in ((0, 1), (3, 2), (5, 4), (6, 4), (7, 1))),
        *(gguf_files.field(f"k{code}", code, bytes(8)) for code in (10, 11, 12)),
    ]
    infos, data = [], b""
    chance = np.random.default_rng(5)
    for code, kind in BY_CODE.items():
        infos.append(gguf_files.info(f"t{code}.weight", [kind.elements, 2], code, len(data)))
        data += chance.bytes(2 * kind.nbytes)
        data += bytes(-len(data) % 32)
    plain = gguf_files.gguf([], [gguf_files.info("a", [2], 0, 0), gguf_files.info("b", [2, 2], 1, 32)], bytes(40))
    return [gguf_files.gguf(fields, infos, data), gguf_files.gguf(fields), plain]


def _archives() -> list[bytes]:
    return [_archive(form) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)]


def _image_adapters() -> list[bytes]:
    folders = ("kohya", "comfy", "diffusers", "lycoris", "xlabs")
    found = [path for one in folders for path in sorted((FIXTURES / "good" / one).rglob("*.safetensors"))]
    return [_described(path) for path in found]


def _distributed() -> list[bytes]:
    """Checkpoints as `distributed` takes them."""
    found = []
    for cuts in [((), ()), ((2,), ()), ((1, 3), (2,))]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            distributed_files.save(folder, {"a.b": distributed_files.Sharded(torch.ones(4, 3), cuts), "iteration": 3})
            metadata = (folder / ".metadata").read_bytes()
            found.append(struct.pack("<H", len(metadata)) + metadata + (folder / "__0_0.distcp").read_bytes())
    return found


_MADE: Mapping[str, Callable[[], list[bytes]]] = {
    "distributed": _distributed,
    "gguf_header": gguf_seeds,
    "image_adapter": _image_adapters,
    "tar_archive": _archives,
}


def _described(path: Path) -> bytes:
    """Names, shapes and metadata of a file, as `image_adapter` takes them."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])
    metadata = header.pop("__metadata__", {})
    found = {name: [entry["dtype"], entry["shape"]] for name, entry in header.items()}
    return json.dumps({**found, "__metadata__": metadata}).encode()


def seeds(name: str) -> list[bytes]:
    """Good and remarkable inputs of a target."""
    if name in _WRITTEN:
        return _WRITTEN[name]
    if name in _MADE:
        return _MADE[name]()
    good, bad = FIXTURES / "good", FIXTURES / "bad"
    if name == "safetensors_header":
        return [path.read_bytes() for path in sorted(good.rglob("*.safetensors"))[:6]] + [hostile.factors()]
    if name == "torch_zip":
        return [path.read_bytes() for path in sorted(good.rglob("*.pt"))[:4] + sorted(good.rglob("*.bin"))[:2]]
    if name == "pickle_subset":
        import zipfile

        archives = sorted(good.rglob("*.pt"))[:4] + sorted(good.rglob("*.bin"))[:2]
        found = [zipfile.ZipFile(path) for path in archives]
        return [each.read(next(n for n in each.namelist() if n.endswith("data.pkl"))) for each in found]
    if name == "quantized_base":
        return [_quantized(one) for one in ENCODERS.values()]
    if name == "records":
        return [_records(), _records(shard=b"x")]
    if name == "strict_text":
        return [path.read_bytes() for path in sorted(good.rglob("*.json"))[:6]]
    if name == "tokenizer":
        paths = [*sorted(good.rglob("tokenizer.json"))[:3], *sorted(bad.rglob("tokenizer.json"))[:3]]
        byte_pairs = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "type": "BPE"}
        return [path.read_bytes() for path in paths] + [json.dumps({"model": byte_pairs, "added_tokens": []}).encode()]
    adapters = [path.parent for path in sorted([*good.rglob("adapter_config.json"), *bad.rglob("adapter_config.json")])]
    found = [(path / "adapter_config.json", path / "adapter_model.safetensors") for path in adapters]
    pairs = [(one.read_bytes(), two.read_bytes()) for one, two in found if two.is_file()] + [
        (CONFIG, hostile.factors())
    ]
    return [struct.pack("<H", len(one)) + one + two for one, two in pairs if len(one) < 65536 and len(two) < 20_000]


def _quantized(encoder: Encoder) -> bytes:
    """A base of one weight, as a scheme stores it."""
    one = encoder(np.random.default_rng(1), 4, 32)
    settings = {"model_type": "llama", "quantization_config": one.settings or one.files["hf_quant_config.json"]}
    first = json.dumps(settings).encode()
    return struct.pack("<H", len(first)) + first + save(one.tensors)


def _records(shard: bytes = b"") -> bytes:
    """A manifest and digests as a merge writes them."""
    name = "a.safetensors" if shard else "config.json"
    options = {"rounding": "nearest", "seed": 0, "container": None, "dtype": None}
    said = {"alpha": None, "rank": None, "scale": None, "fan_in_fan_out": None, "strength": 1.0, "format": "peft"}
    used = {**said, "files": [], "digest": "0" * 64}
    tool = {"name": "loraformat", "version": "0"}
    manifest = {
        "schema": "loraformat.manifest/1",
        "job": "merge",
        "tool": tool,
        "options": {**options, "max_shard_nbytes": None},
        "base": {"files": [{"name": name, "nbytes": 2}], "layers": [0, 0]},
        "adapters": [used],
        "history": [{"tool": tool, "options": options, "adapters": [used]}],
        "outputs": [{"name": name, "nbytes": 2, "blake3": "0" * 64}],
        "weights": {"w": {"dtype": "F32", "blake3": "0" * 64, "terms": []}},
        "sha256": "0" * 64,
    }
    digests = {
        "schema": "loraformat.digests/1",
        "algorithm": "blake3",
        "files": {name: {"nbytes": 2, "runs": [[0, 2, "0" * 64]]}},
        "digest": "0" * 64,
    }
    first = json.dumps(manifest).encode()
    return struct.pack("<I", len(first)) + first + json.dumps(digests).encode()


def call(name: str, data: bytes) -> None:
    """One execution of a target."""
    try:
        TARGETS[name](data)
    except LoraFormatError as error:
        text = show(error)
        assert not set(text) & set("\x1b\x07\x9b\u202e\n")
