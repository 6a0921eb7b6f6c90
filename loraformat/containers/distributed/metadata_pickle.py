"""The pickle in `.metadata`, as data: objects of torch.distributed.checkpoint become `Record`s. Nothing is called.

Source: torch 2.13.0, distributed/checkpoint/metadata.py, filesystem.py `_StorageInfo`, planner.py; CPython 3.11,
Lib/pickle.py (protocol 4); Megatron-LM d98e8a6, core/dist_checkpointing/strategies/torch.py `MCoreMetadata`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loraformat.containers.torch_file.pickle_subset import (
    STEPS,
    Machine,
    Step,
    Symbol,
    dtype_of,
    integers_of,
    push,
    text_of,
)

_CHECKPOINT: Final = "torch.distributed.checkpoint"
_MCORE: Final = "megatron.core.dist_checkpointing.strategies.torch"
# Classes whose objects are read as their fields. Earlier versions of torch took the properties from another module,
# and Megatron-Core has names of its own for two of them.
_OBJECTS: Final = {
    **{
        (f"{_CHECKPOINT}.metadata", name): name
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "MetadataIndex", "StorageMeta"),
        )
    },
    **{(f"{_CHECKPOINT}.planner", name): name for name in ("SavePlan", "WriteItem", "TensorWriteData")},
    **{(f"{_CHECKPOINT}.filesystem", name): name for name in ("_StorageInfo", "_StoragePrefix")},
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): "TensorProperties",
    (_MCORE, "MCoreMetadata"): "Metadata",
    (_MCORE, "MCoreSavePlan"): "SavePlan",
}
# Enumerations, of which the number is kept.
_NUMBERS: Final = {
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.planner", "WriteItemType"),
}
_PATHS: Final = {
    (module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
}
_PROPERTIES: Final = ("dtype", "layout", "requires_grad", "memory_format", "pin_memory")


class Record:
    """An object of the pickle, whose fields come after it was made.

    Attributes:
        kind: the name of its class.
        fields: by name; None until the pickle says them.
    """

    __slots__ = ("fields", "kind")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.fields: Mapping[object, object] | None = None


class IndexKey(bytes):
    """A `MetadataIndex` that is the key of a dict: the name of a tensor and the offset of a shard.

    Bytes, since their hash is another one in each run: see `IntegerKey`. Never equal to a string.
    """

    __slots__ = ()

    @classmethod
    def of(cls, name: str, offset: tuple[int, ...] | None) -> IndexKey:
        """The key for a tensor's shard, or with None for an object."""
        place = "" if offset is None else ",".join(map(str, offset)) + ","
        return cls(f"{place}:{name}".encode("utf-8", "surrogatepass"))


def read_metadata_pickle(data: bytes, where: str) -> object:
    """The one value of a `.metadata` file: as `read_pickle` gives it, with a `Record` for each known object.

    Raises: UnsafePickle (LF007): anything else; it was not executed.
    """
    return _MetadataMachine(data, where).value()


class _MetadataMachine(Machine):
    """The dialect of `pickle.dump` for the classes of torch.distributed.checkpoint."""

    protocols = (3, 4, 5)
    writer = "torch.distributed.checkpoint"

    @property
    def steps(self) -> Mapping[int, Step]:
        """See `Machine`."""
        return _STEPS

    def is_known(self, found: Symbol) -> bool:
        """See `Machine`."""
        name = (found.module, found.name)
        return (
            name in _OBJECTS
            or name in _NUMBERS
            or name in _PATHS
            or name in (("torch", "Size"), ("torch.serialization", "_get_layout"))
            or dtype_of(found) is not None
        )

    def called(self, callee: Symbol, arguments: tuple[object, ...]) -> object | None:
        """See `Machine`."""
        name = (callee.module, callee.name)
        match arguments:
            case (tuple() as sizes,) if name == ("torch", "Size"):
                return integers_of(sizes)
            case (str(layout),) if name == ("torch.serialization", "_get_layout"):
                return layout
            case (int(number),) if name in _NUMBERS:
                return number
            case parts if name in _PATHS and all(type(part) is str for part in parts):
                return "/".join(map(str, parts))
            case _:
                return None

    def key(self, key: object) -> object:
        """See `Machine`: a `MetadataIndex` stands for itself."""
        if not isinstance(key, Record):
            return super().key(key)
        fields = (key.fields or {}) if key.kind == "MetadataIndex" else {}
        name, offset = fields.get("fqn"), fields.get("offset")
        sizes = integers_of(offset)
        if not isinstance(name, str) or (offset is not None and sizes is None):
            self.refuse("a dict key that is neither a string nor the index of a tensor")
        return IndexKey.of(name, sizes)

    def new(self) -> None:
        """An object without fields, yet."""
        arguments, found = self.pop(), self.pop()
        kind = _OBJECTS.get((found.module, found.name)) if isinstance(found, Symbol) else None
        if kind is None or arguments != ():
            self.refuse("the pickle creates an object that checkpoints do not contain; it was not executed")
        self.stack.append(Record(kind))

    def build(self) -> None:
        """The fields of the object below on the stack, once."""
        state = self.pop()
        target = self.stack[-1]
        if not isinstance(target, Record) or target.fields is not None:
            self.refuse("the pickle sets attributes of an object; it was not executed")
        if target.kind == "TensorProperties" and type(state) is tuple and len(state) == len(_PROPERTIES):
            target.fields = dict(zip(_PROPERTIES, state, strict=True))
        elif type(state) is dict:
            target.fields = state
        else:
            self.refuse("the pickle sets attributes of an object; it was not executed")

    def global_of_stack(self) -> None:
        """A name whose two parts are on the stack."""
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            self.refuse("the pickle names something by a value that is not a string")
        self.name(Symbol(module, name))

    def frame(self) -> None:
        """What comes next is so many bytes long, which says nothing new."""
        if int.from_bytes(self.take(8), "little") > len(self.data) - self.position:
            raise IndexError


_STEPS: Final[Mapping[int, Step]] = {
    **{opcode: step for opcode, step in STEPS.items() if opcode != ord("Q")},
    0x8C: push(lambda machine: text_of(machine, machine.take(1)[0])),
    0x81: lambda machine: _own(machine).new(),
    0x93: lambda machine: _own(machine).global_of_stack(),
    0x94: lambda machine: machine.put(len(machine.memo)),
    0x95: lambda machine: _own(machine).frame(),
}


def _own(machine: Machine) -> _MetadataMachine:
    assert isinstance(machine, _MetadataMachine)
    return machine
