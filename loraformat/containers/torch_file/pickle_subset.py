"""A pickle read as data: the opcodes that torch.save writes for plain values and tensors. Nothing is ever called.

A name of a class or function becomes a `Symbol`; "calling" one of the dozen known symbols makes a description. Any
other opcode, symbol or call raises UnsafePickle.

Source: CPython 3.11, Lib/pickletools.py; torch 2.13, `torch/_utils.py` and `torch/_tensor.py` `_reduce_ex_internal`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

from loraformat.diagnostics import show
from loraformat.errors import UnsafePickle
from loraformat.model.tensors import DType

MOST_NBYTES = 64 << 20
MOST_OPCODES = 10_000_000
MOST_MEMO = 1_000_000
_MOST_ARGUMENTS = 16  # of a call; and sizes, which torch limits to 64
_MOST_SIZES = 64
_HINT = "save only the tensors, as safetensors, where the file was made"

_STORAGES: Final = {
    "DoubleStorage": DType.F64,
    "FloatStorage": DType.F32,
    "HalfStorage": DType.F16,
    "BFloat16Storage": DType.BF16,
    "ComplexFloatStorage": DType.C64,
    "LongStorage": DType.I64,
    "IntStorage": DType.I32,
    "ShortStorage": DType.I16,
    "CharStorage": DType.I8,
    "ByteStorage": DType.U8,
    "BoolStorage": DType.BOOL,
}
_CALLABLE: Final = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch", "Size"),
    ("torch", "device"),
}


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name in a pickle; what it names is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return show(f"{self.module}.{self.name}", 200)


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage record of the archive.

    Attributes:
        key: its name is `data/{key}`.
        dtype: None for an untyped storage, whose `numel` counts bytes.
    """

    key: str
    dtype: DType | None
    numel: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor: which elements of a storage it has. Nothing about the numbers has been checked."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class IntegerKey(bytes):
    """An integer that is the key of a dict: its decimal digits.

    Integers that the author of a file chooses can make every look into a dict of n of them take n steps; the hash of
    bytes is another one in each run. Never equal to a string.
    """

    __slots__ = ()

    @classmethod
    def of(cls, number: int) -> IntegerKey:
        """The key for a number."""
        return cls(str(number).encode("ascii"))

    def __str__(self) -> str:
        return self.decode("ascii")


class _Mark:
    """The bottom of a group on the stack."""


_MARK = _Mark()


def read_pickle(data: bytes, where: str) -> object:
    """The one value of a pickle: dicts, lists, tuples, strings, numbers, None, and `View` for each tensor.

    A key of a dict is a string, or an `IntegerKey` for an integer. Takes time in proportion to the pickle's length.

    Lists and dicts may be shared, and may contain themselves; who walks over them bounds the walk.

    Raises: UnsafePickle (LF007): anything else; it was not executed.
    """
    return Machine(data, where).value()


class Machine:
    """The state of a pickle that is being read, in the dialect of torch.save's tensors.

    Attributes:
        protocols: those of the pickle that are read.
        writer: who writes such pickles, for messages.
    """

    protocols: tuple[int, ...] = (2,)
    writer = "torch.save"

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where = data, where
        self.position = 0
        self.stack: list[object] = []
        # A list, since pickles number their values from 0 on: see `IntegerKey` for why it is not a dict.
        self.memo: list[object] = []
        self.storages: dict[str, Symbol] = {}

    @property
    def steps(self) -> Mapping[int, Step]:
        """What each opcode does."""
        return STEPS

    def value(self) -> object:
        """See `read_pickle`."""
        if len(self.data) > MOST_NBYTES:
            self.refuse(f"a pickle of {len(self.data)} bytes, at most {MOST_NBYTES} are read")
        try:
            return self._run()
        except (IndexError, struct.error) as error:
            text = "the pickle ends early, or takes more from its stack than there is"
            raise UnsafePickle(text, where=self.where) from error

    def _run(self) -> object:
        if self.data[:1] != b"\x80" or self.data[1] not in self.protocols:
            numbers = " or ".join(map(str, self.protocols))
            self.refuse(f"the pickle protocol is not {numbers}, which {self.writer} writes")
        self.position = 2
        known = self.steps
        steps = 0
        while (opcode := self.take(1)[0]) != ord("."):
            step = known.get(opcode)
            if step is None:
                self.refuse(
                    f"the pickle has opcode {bytes([opcode])!r}, which {self.writer} does not write for tensors"
                )
            step(self)
            steps += 1
            if steps > MOST_OPCODES:
                self.refuse(f"a pickle of more than {MOST_OPCODES} opcodes")
        return self.result()

    def result(self) -> object:
        """The one value that is left."""
        if self.position != len(self.data) or len(self.stack) != 1 or self.stack[0] is _MARK:
            self.refuse("bytes or values are left over at the end of the pickle")
        return self.stack[0]

    def refuse(self, message: str) -> NoReturn:
        """Raises: UnsafePickle (LF007), always."""
        raise UnsafePickle(message, where=self.where, hint=_HINT)

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        part = self.data[self.position : self.position + nbytes]
        if len(part) != nbytes:
            raise IndexError
        self.position += nbytes
        return part

    def line(self) -> str:
        """The text up to the next line end."""
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise IndexError
        text = self.data[self.position : end]
        self.position = end + 1
        return text.decode("utf-8", "backslashreplace")

    def pop(self) -> object:
        """The value on top of the stack."""
        value = self.stack.pop()
        if value is _MARK:
            self.refuse("the pickle pops a value past a mark")
        return value

    def pop_group(self) -> list[object]:
        """The values above the last mark."""
        position = len(self.stack) - 1
        while self.stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise IndexError
        group = self.stack[position + 1 :]
        del self.stack[position:]
        return group

    def put(self, index: int) -> None:
        """Remember the value on top of the stack."""
        if index >= MOST_MEMO:
            self.refuse(f"a pickle that memoizes more than {MOST_MEMO} values")
        if self.stack[-1] is _MARK:
            self.refuse("the pickle memoizes a mark")
        if index >= len(self.memo):
            self.memo.extend([_MARK] * (index + 1 - len(self.memo)))
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        """Put a remembered value on the stack."""
        if index >= len(self.memo) or self.memo[index] is _MARK:
            self.refuse(f"the pickle refers to memo {index}, which does not exist")
        self.stack.append(self.memo[index])

    def fill_list(self, values: list[object]) -> None:
        """Append values to the list on top of the stack."""
        target = self.stack[-1]
        if type(target) is not list:
            self.refuse("the pickle appends to something that is not a list")
        target.extend(values)

    def fill_dict(self, values: list[object]) -> None:
        """Set items, key and value in turn, of the dict on top of the stack."""
        target = self.stack[-1]
        if type(target) is not dict or len(values) % 2:
            self.refuse("the pickle sets items of something that is not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[self.key(key)] = value

    def key(self, key: object) -> object:
        """What stands for a key of a dict.

        Other keys could be nested so deep that hashing them overflows the stack of the interpreter.
        """
        if type(key) not in (str, int):
            self.refuse("a dict key that is neither a string nor an integer")
        return IntegerKey.of(key) if isinstance(key, int) else key

    def symbol(self) -> None:
        """A name, as two lines of text."""
        self.name(Symbol(self.line(), self.line()))

    def name(self, found: Symbol) -> None:
        """Put a name on the stack."""
        if not self.is_known(found):
            self.refuse(f"the pickle names {found}, which tensors do not need; it was not executed")
        self.stack.append(found)

    def storage(self) -> None:
        """A persistent id: that of a storage."""
        match self.pop():
            case ("storage", Symbol() as kind, str(key), str(), int(numel)) if _is_storage(kind):
                if self.storages.setdefault(key, kind) != kind:
                    told = f'storage "{show(key, 40)}" is named with two dtypes, {self.storages[key]} and {kind}'
                    self.refuse(f"{told}, which torch.save refuses to write")
                self.stack.append(Storage(key, _STORAGES.get(kind.name), numel))
            case _:
                self.refuse("a persistent id that is not that of a storage")

    def call(self) -> None:
        """What stands for the call of a name."""
        arguments, callee = self.pop(), self.pop()
        if not isinstance(callee, Symbol) or type(arguments) is not tuple or len(arguments) > _MOST_ARGUMENTS:
            self.refuse("the pickle calls something that is not a function; it was not executed")
        made = self.called(callee, arguments)
        if made is None:
            self.refuse(f"the pickle calls {callee} with arguments that torch.save does not write; it was not executed")
        self.stack.append(made)

    def is_known(self, found: Symbol) -> bool:
        """Whether a name may stand in the pickle."""
        return _is_known(found)

    def called(self, callee: Symbol, arguments: tuple[object, ...]) -> object | None:
        """What a call makes; None where nobody but an attacker would call it like that."""
        return _called(callee, arguments)

    def build(self) -> None:
        """An OrderedDict gets attributes: `_metadata` of a state dict, which says nothing about the tensors."""
        state = self.pop()
        target = self.stack[-1]
        if (
            type(target) is not dict
            or type(state) is not dict
            or len(state) > 1
            or any(key != "_metadata" for key in state)
        ):
            self.refuse("the pickle sets attributes of an object; it was not executed")


def _is_storage(symbol: Symbol) -> bool:
    return (symbol.module == "torch" and symbol.name in _STORAGES) or (
        symbol.module == "torch.storage" and symbol.name == "UntypedStorage"
    )


def dtype_of(value: object) -> DType | None:
    """The dtype that a name like torch.float32 names."""
    if isinstance(value, Symbol) and value.module == "torch":
        return DType.by_torch_name(value.name)
    return None


def _is_known(symbol: Symbol) -> bool:
    return (symbol.module, symbol.name) in _CALLABLE or _is_storage(symbol) or dtype_of(symbol) is not None


def _called(callee: Symbol, arguments: tuple[object, ...]) -> object | None:
    """What a call makes; None where nobody but an attacker would call it like that."""
    match callee.name, arguments:
        case "OrderedDict", ():
            return {}
        case "Size", (tuple() as sizes,) if integers_of(sizes) is not None:
            return sizes
        case "device", (str(kind), *rest) if integers_of(tuple(rest)) is not None:
            return ":".join([kind, *map(str, rest)])
        case ("_rebuild_parameter", (View() as view, bool(), hooks)) | (
            "_rebuild_parameter_with_state",
            (View() as view, bool(), hooks, _),
        ) if hooks == {}:
            return view
        case "_rebuild_tensor_v2", (Storage(dtype=DType() as dtype) as storage, *rest):
            return _view(storage, dtype, rest)
        case "_rebuild_tensor_v3", (Storage(dtype=None) as storage, offset, shape, strides, flag, hooks, kind, *rest):
            dtype_ = dtype_of(kind)
            return None if dtype_ is None else _view(storage, dtype_, [offset, shape, strides, flag, hooks, *rest])
        case _:
            return None


def _view(storage: Storage, dtype: DType, arguments: list[object]) -> View | None:
    """Arguments: offset, shape, strides, requires_grad, hooks (none), metadata (none: a conjugated view has some)."""
    if len(arguments) not in (5, 6):
        return None
    offset, shape, strides, flag, hooks = arguments[:5]
    metadata = arguments[5] if len(arguments) == 6 else None
    sizes, steps = integers_of(shape), integers_of(strides)
    if not isinstance(offset, int) or type(flag) is not bool or hooks != {} or metadata not in (None, {}):
        return None
    return None if sizes is None or steps is None else View(storage, dtype, offset, sizes, steps)


def integers_of(value: object) -> tuple[int, ...] | None:
    """A tuple of integers, at most 64; None for anything else."""
    if type(value) is not tuple or len(value) > _MOST_SIZES:
        return None
    found = tuple(size for size in value if type(size) is int)
    return found if len(found) == len(value) else None


Step = Callable[[Machine], None]


def push(make: Callable[[Machine], object]) -> Step:
    """The step that puts a value on the stack."""
    return lambda machine: machine.stack.append(make(machine))


def _tuple_of(count: int) -> Callable[[Machine], None]:
    def step(machine: Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))

    return step


def text_of(machine: Machine, nbytes: int) -> str:
    """A string of so many bytes."""
    try:
        return machine.take(nbytes).decode("utf-8")
    except UnicodeDecodeError:
        machine.refuse("a string that is not UTF-8")


def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.fill_dict([key, value])


def _unsigned(nbytes: int) -> Callable[[Machine], int]:
    return lambda machine: int.from_bytes(machine.take(nbytes), "little")


STEPS: Final[Mapping[int, Step]] = {
    ord("("): push(lambda machine: _MARK),  # noqa: ARG005
    ord("N"): push(lambda machine: None),  # noqa: ARG005
    0x88: push(lambda machine: True),  # noqa: ARG005
    0x89: push(lambda machine: False),  # noqa: ARG005
    ord("K"): push(_unsigned(1)),
    ord("M"): push(_unsigned(2)),
    ord("J"): push(lambda machine: int.from_bytes(machine.take(4), "little", signed=True)),
    0x8A: push(lambda machine: int.from_bytes(machine.take(machine.take(1)[0]), "little", signed=True)),
    ord("G"): push(lambda machine: struct.unpack(">d", machine.take(8))[0]),
    ord("X"): push(lambda machine: text_of(machine, int.from_bytes(machine.take(4), "little"))),
    ord("]"): push(lambda machine: []),  # noqa: ARG005
    ord("}"): push(lambda machine: {}),  # noqa: ARG005
    ord(")"): push(lambda machine: ()),  # noqa: ARG005
    ord("t"): push(lambda machine: tuple(machine.pop_group())),
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("a"): lambda machine: machine.fill_list([machine.pop()]),
    ord("e"): lambda machine: machine.fill_list(machine.pop_group()),
    ord("s"): _set_item,
    ord("u"): lambda machine: machine.fill_dict(machine.pop_group()),
    ord("q"): lambda machine: machine.put(machine.take(1)[0]),
    ord("r"): lambda machine: machine.put(int.from_bytes(machine.take(4), "little")),
    ord("h"): lambda machine: machine.get(machine.take(1)[0]),
    ord("j"): lambda machine: machine.get(int.from_bytes(machine.take(4), "little")),
    ord("c"): lambda machine: machine.symbol(),
    ord("Q"): lambda machine: machine.storage(),
    ord("R"): lambda machine: machine.call(),
    ord("b"): lambda machine: machine.build(),
}
