"""Folders that somebody made to hurt: each is written by a function of its own, small on disk whatever it claims."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "a/b"}


def safetensors(
    tensors: dict[str, tuple[str, list[int], int]] | bytes, data: bytes | None = None, **more: Any
) -> bytes:
    """A file of (dtype, shape, bytes) entries, or with a header as it is given."""
    if isinstance(tensors, bytes):
        return struct.pack("<Q", len(tensors)) + tensors + (data or b"")
    fields: dict[str, Any] = dict(more)
    position = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    header = json.dumps(fields).encode()
    return struct.pack("<Q", len(header)) + header + (bytes(position) if data is None else data)


def factors(module: str = MODULE, **more: Any) -> bytes:
    return safetensors(
        {f"{module}.lora_A.weight": ("F32", [2, 4], 32), f"{module}.lora_B.weight": ("F32", [4, 2], 32)}, **more
    )


def archive(pickle: bytes, **records: bytes) -> bytes:
    """A zip as torch.save writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as entries:
        for name, content in {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n", **records}.items():
            entries.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    return out.getvalue()


def peft(
    folder: Path, weights: bytes | None = None, config: Any = None, name: str = "adapter_model.safetensors"
) -> None:
    (folder / name).write_bytes(factors() if weights is None else weights)
    text = (
        json.dumps({**CONFIG, **config})
        if isinstance(config, dict)
        else json.dumps(CONFIG)
        if config is None
        else config
    )
    (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())


CALL = b"cposix\nsystem\nX\x0b\x00\x00\x00touch PWNED\x85R."


def call_in_a_zip(folder: Path) -> None:
    peft(folder, archive(b"\x80\x02" + CALL), name="adapter_model.bin")


def bare_call(folder: Path) -> None:
    peft(folder, b"\x80\x02" + CALL, name="adapter_model.bin")


def call_named_safetensors(folder: Path) -> None:
    peft(folder, b"\x80\x02" + CALL)


def import_by_config(folder: Path) -> None:
    (folder / "evil.py").write_text("open('PWNED', 'w')\n")
    peft(folder, config={"auto_mapping": {"parent_library": "evil", "base_model_class": "x"}, "megatron_core": "evil"})


def template_in_a_tokenizer(folder: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    peft(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "chat_template.jinja").write_text(template)


def deflated_bomb(folder: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as entries:
        entries.writestr("archive/data.pkl", b"\x80\x02}.")
        entries.writestr("archive/data/0", zlib.compress(bytes(1 << 24)) + bytes(1 << 24))
    peft(folder, out.getvalue(), name="adapter_model.bin")


def nested_pickle(folder: Path) -> None:
    peft(folder, archive(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."), name="adapter_model.bin")


def doubling_pickle(folder: Path) -> None:
    peft(folder, archive(b"\x80\x02]q\x00" + b"h\x00h\x00\x86q\x00" * 64 + b"."), name="adapter_model.bin")


def sparse_16_gib(folder: Path) -> None:
    size = 1 << 34
    entries = {f"{MODULE}.lora_A.weight": ("F32", [2, size // 16], size // 2)}
    entries[f"{MODULE}.lora_B.weight"] = ("F32", [size // 16, 2], size // 2)
    head = safetensors(entries, b"")
    peft(folder, head)
    os.truncate(folder / "adapter_model.safetensors", len(head) + size)


def header_of_2_to_the_63(folder: Path) -> None:
    peft(folder, struct.pack("<Q", 1 << 63) + b"{}")


def header_beyond_the_file(folder: Path) -> None:
    peft(folder, struct.pack("<Q", 99_000_000) + b'{"a":')


def huge_empty_shape(folder: Path) -> None:
    peft(folder, safetensors({f"{MODULE}.lora_A.weight": ("F32", [0, 1 << 52, 1 << 52], 0)}))


def offsets_past_the_end(folder: Path) -> None:
    peft(folder, safetensors({"a": ("F32", [1 << 40], 1 << 42)}, b"1234"))


def twenty_thousand_tensors(folder: Path) -> None:
    peft(folder, safetensors({f"t{number}": ("F32", [1], 4) for number in range(20_000)}))


def long_dotted_name(folder: Path) -> None:
    peft(folder, factors(".".join("a" * 4000)))


def deep_json(folder: Path) -> None:
    peft(folder, config=b'{"peft_type": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def long_integer(folder: Path) -> None:
    peft(folder, config=b'{"peft_type": "LORA", "r": ' + b"9" * 100_000 + b"}")


def utf_16(folder: Path) -> None:
    peft(folder, config=json.dumps(CONFIG).encode("utf-16"))


def slow_expression(folder: Path) -> None:
    peft(folder, factors("base_model.model." + "a" * 60), {"target_modules": "(.*)*(a|aa)+\\.q_proj$"})


def back_reference(folder: Path) -> None:
    peft(folder, config={"target_modules": "(.*)(.*)(.*)(.*)\\1\\2_proj", "rank_pattern": {"(a+)+$": 2}})


def many_targets(folder: Path) -> None:
    peft(folder, config={"target_modules": [f"m{number}" for number in range(50_000)]})


def fifo_in_the_folder(folder: Path) -> None:
    peft(folder)
    os.mkfifo(folder / "tokenizer.json")
    os.mkfifo(folder / "adapter_model.bin")


def device_in_place_of_weights(folder: Path) -> None:
    peft(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("/dev/zero")


def link_to_a_secret(folder: Path) -> None:
    peft(folder)
    (folder.parent / "secret.txt").write_text("SECRET-4711")
    for name in ("README.md", "tokenizer.json", "added_tokens.json"):
        (folder / name).symlink_to(folder.parent / "secret.txt")


def loop_of_links(folder: Path) -> None:
    peft(folder)
    (folder / "tokenizer.json").symlink_to("merges.txt")
    (folder / "merges.txt").symlink_to("tokenizer.json")


def escapes_everywhere(folder: Path) -> None:
    nasty = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\u2066\U000e0041\uffff\r::error::x ##[error]y ##vso[task]z"
    weights = factors(f"base_model.model.{nasty}", __metadata__={nasty: nasty})
    peft(folder, weights, {"base_model_name_or_path": nasty, "task_type": nasty, nasty: nasty})
    (folder / f"{nasty}.txt".replace("/", "")).write_text(nasty)


def markup_everywhere(folder: Path) -> None:
    peft(folder, factors("base_model.model.[bold]x[/red]"), {"base_model_name_or_path": "[/bold][link=http://x]y"})


def token_of_two_to_the_32(folder: Path) -> None:
    peft(folder)
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}})
    )


def damaged_normalizer(folder: Path) -> None:
    peft(folder)
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "normalizer": normalizer}))


def image(folder: Path, **metadata: str) -> None:
    """A good file of kohya's names with a hostile header."""
    sizes = {f"lora_unet_conv_in.lora_{side}.weight": ("F32", [2, 2], 16) for side in ("down", "up")}
    (folder / "lora.safetensors").write_bytes(safetensors(sizes, struct.pack("<8f", *[1.0] * 8), __metadata__=metadata))


def deep_adapter_metadata(folder: Path) -> None:
    image(folder, lora_adapter_metadata="[" * 100_000)


def slow_alpha_pattern(folder: Path) -> None:
    said = {"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"(a|aa)+" * 40 + "$": 4}}
    image(folder, lora_adapter_metadata=json.dumps(said))


def deep_tags(folder: Path) -> None:
    image(folder, ss_tag_frequency='{"a":' * 100_000)


def many_tags(folder: Path) -> None:
    image(folder, ss_tag_frequency=json.dumps({"img": {f"\x1b[2Jtag{n}": 2**63 for n in range(50_000)}}))


def numbers_in_every_name(folder: Path) -> None:
    names = [f"lora_unet_{'_'.join(['0'] * 2000)}_{n}.lora_down.weight" for n in range(50)]
    (folder / "lora.safetensors").write_bytes(safetensors({name: ("F32", [1, 1], 4) for name in names}))


def url_as_base(folder: Path) -> None:
    peft(folder, config={"base_model_name_or_path": "http://127.0.0.1:9/model"})


def distributed(folder: Path, metadata: bytes) -> None:
    (folder / ".metadata").write_bytes(metadata)
    (folder / "__0_0.distcp").write_bytes(archive(b"\x80\x02K\x01."))


def call_in_metadata(folder: Path) -> None:
    name = b"\x8c\x05posix\x8c\x06system\x93"
    distributed(folder, b"\x80\x04" + name + b"\x8c\x0btouch PWNED\x85R.")


def object_in_metadata(folder: Path) -> None:
    distributed(folder, b"\x80\x04\x8c\x0asubprocess\x8c\x05Popen\x93)\x81}b.")


def memories_in_metadata(folder: Path) -> None:
    distributed(folder, b"\x80\x04" + b"]\x94" * 3_000_000 + b".")


def doubling_metadata(folder: Path) -> None:
    """Lists that hold the list before twice."""
    distributed(
        folder,
        b"\x80\x04]\x94" + b"".join(b"]\x94(" + 2 * (b"j" + struct.pack("<I", n)) + b"e" for n in range(200)) + b".",
    )


def shards_outside_the_folder(folder: Path) -> None:
    """The bytes of a shard are said to be in another folder."""
    import pickle

    import torch
    from distributed_files import save

    save(folder, {"decoder.layers.0.mlp.linear_fc2.adapter.linear_in.weight": torch.ones(2, 2)})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../../../../../etc/passwd"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


MAKERS: tuple[Callable[[Path], None], ...] = (
    call_in_a_zip,
    bare_call,
    call_named_safetensors,
    import_by_config,
    template_in_a_tokenizer,
    deflated_bomb,
    nested_pickle,
    doubling_pickle,
    sparse_16_gib,
    header_of_2_to_the_63,
    header_beyond_the_file,
    huge_empty_shape,
    offsets_past_the_end,
    twenty_thousand_tensors,
    long_dotted_name,
    deep_json,
    long_integer,
    utf_16,
    slow_expression,
    back_reference,
    many_targets,
    fifo_in_the_folder,
    device_in_place_of_weights,
    link_to_a_secret,
    loop_of_links,
    escapes_everywhere,
    markup_everywhere,
    token_of_two_to_the_32,
    damaged_normalizer,
    url_as_base,
    deep_adapter_metadata,
    slow_alpha_pattern,
    deep_tags,
    many_tags,
    numbers_in_every_name,
    call_in_metadata,
    object_in_metadata,
    memories_in_metadata,
    doubling_metadata,
    shards_outside_the_folder,
)


def make_all(target: Path) -> list[Path]:
    """Every folder, below `target`."""
    folders = []
    for maker in MAKERS:
        folder = target / maker.__name__ / "adapter"
        folder.mkdir(parents=True)
        maker(folder)
        folders.append(folder)
    return folders
