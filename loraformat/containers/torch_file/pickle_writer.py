"""The pickle of a torch file, written opcode by opcode: a dict of tensors, plain values, dicts around them.

Source: CPython 3.11, Lib/pickletools.py (protocol 2); torch 2.13, `torch/_tensor.py` `_reduce_ex_internal`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from loraformat.model.tensors import DType

_STORAGES = {
    DType.F64: "DoubleStorage",
    DType.F32: "FloatStorage",
    DType.F16: "HalfStorage",
    DType.BF16: "BFloat16Storage",
    DType.C64: "ComplexFloatStorage",
    DType.I64: "LongStorage",
    DType.I32: "IntStorage",
    DType.I16: "ShortStorage",
    DType.I8: "CharStorage",
    DType.U8: "ByteStorage",
    DType.BOOL: "BoolStorage",
}


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that fills the storage `data/{key}`, row-major."""

    key: str
    dtype: DType
    shape: tuple[int, ...]


# A value to be written: JSON values, with tensors in their dicts.
Tree = Mapping[str, object]


def write_pickle(tree: Tree) -> bytes:
    """The pickle of a dict whose values are `Whole`, plain values, or such dicts; keys in their order.

    `torch.load(…, weights_only=True)` reads it inside its archive.
    """
    writer = _Writer()
    writer.tree(tree)
    return b"\x80\x02" + b"".join(writer.parts) + b"."


class _Writer:
    """Opcodes so far, and which strings and symbols the reader remembers."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.memo: dict[str, int] = {}

    def add(self, *parts: bytes) -> None:
        self.parts.extend(parts)

    def tree(self, tree: Tree) -> None:
        self.add(b"}(")
        for key, value in tree.items():
            self.text(key)
            if isinstance(value, Whole):
                self.tensor(value)
            elif isinstance(value, Mapping):
                self.tree(value)
            else:
                self.plain(value)
        self.add(b"u")

    def plain(self, value: object) -> None:
        if value is None:
            self.add(b"N")
        elif isinstance(value, bool):
            self.add(b"\x88" if value else b"\x89")
        elif isinstance(value, int):
            self.integer(value)
        elif isinstance(value, float):
            self.add(b"G", struct.pack(">d", value))
        elif isinstance(value, str):
            self.text(value)
        elif isinstance(value, list):
            self.add(b"](")
            for item in value:
                self.plain(item)
            self.add(b"e")
        else:
            assert isinstance(value, Mapping)
            self.tree(value)

    def text(self, text: str) -> None:
        data = text.encode("utf-8")
        self.add(b"X", struct.pack("<I", len(data)), data)

    def integer(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self.add(b"J", struct.pack("<i", value))
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.add(b"\x8a", bytes([len(data)]), data)

    def integers(self, values: tuple[int, ...]) -> None:
        self.add(b"(")
        for value in values:
            self.integer(value)
        self.add(b"t")

    def symbol(self, symbol: str) -> None:
        """A global, `module name`; from its second use on recalled from the memo."""
        known = self.memo.get(symbol)
        if known is not None:
            self.add(b"h", bytes([known]))
            return
        self.memo[symbol] = len(self.memo)
        module, name = symbol.split(" ")
        self.add(b"c", f"{module}\n{name}\n".encode("ascii"), b"q", bytes([self.memo[symbol]]))

    def tensor(self, tensor: Whole) -> None:
        storage = _STORAGES.get(tensor.dtype)
        self.symbol("torch._utils _rebuild_tensor_v2" if storage else "torch._utils _rebuild_tensor_v3")
        numel = 1
        strides: list[int] = []
        for size in reversed(tensor.shape):
            strides.insert(0, numel)
            numel *= size
        self.add(b"((")
        self.text("storage")
        self.symbol(f"torch {storage}" if storage else "torch.storage UntypedStorage")
        self.text(tensor.key)
        self.text("cpu")
        self.integer(numel if storage else numel * tensor.dtype.itemsize)
        self.add(b"tQ")
        self.integer(0)
        self.integers(tensor.shape)
        self.integers(tuple(strides))
        self.add(b"\x89")
        self.symbol("collections OrderedDict")
        self.add(b")R")
        if not storage:
            self.symbol(f"torch {tensor.dtype.torch_name}")
        self.add(b"tR")
