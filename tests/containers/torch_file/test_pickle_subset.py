"""The pickle reader: what it refuses, and that it never executes anything."""

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.containers.torch_file.pickle_subset import IntegerKey, Storage, View, read_pickle
from loraformat.containers.torch_file.pickle_writer import write_pickle
from loraformat.containers.torch_file.state_dict import find_state_dict
from loraformat.errors import UnsafePickle
from loraformat.model.tensors import DType

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 200), 1 << 200)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(st.characters(codec="utf-8")) | st.integers(), inner, max_size=5)
        | st.tuples(inner)
        | st.tuples(inner, inner, inner, inner)
    ),
    max_leaves=30,
)


@given(PLAIN)
def test_plain_values_come_back(value: object) -> None:
    assert read_pickle(pickle.dumps(value, protocol=2), "x") == with_number_keys(value)


def with_number_keys(value: object) -> object:
    if isinstance(value, dict):
        keys = (key if isinstance(key, str) else IntegerKey.of(key) for key in value)
        return dict(zip(keys, map(with_number_keys, value.values()), strict=True))
    if isinstance(value, (list, tuple)):
        return type(value)(map(with_number_keys, value))
    return value


def test_an_ordered_dict_is_a_dict() -> None:
    assert read_pickle(pickle.dumps(OrderedDict(b=1, a=2), protocol=2), "x") == {"b": 1, "a": 2}


def test_many_values_and_long_strings() -> None:
    value = {"long": "x" * 70_000, "many": list(range(70_000)), "names": [str(number) for number in range(2000)]}
    assert read_pickle(pickle.dumps(value, protocol=2), "x") == value


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def test_a_payload_is_named_and_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    with pytest.raises(UnsafePickle, match=r"names posix.mkdir, .* it was not executed .*safetensors"):
        read_pickle(pickle.dumps({"w": Payload(str(marker))}, protocol=2), "x")
    assert not marker.exists()


G = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"


def tensor(
    storage: bytes = STORAGE,
    offset: bytes = b"K\0",
    shape: bytes = b"K\x04\x85",
    strides: bytes = b"K\x01\x85",
    rest: bytes = b"\x89" + HOOKS,
) -> bytes:
    return G + b"(" + storage + offset + shape + strides + rest + b"tR"


def test_a_tensor_is_described() -> None:
    expected = View(Storage("0", DType.F32, 4), DType.F32, 0, (4,), (1,))
    assert read_pickle(b"\x80\x02" + tensor() + b".", "x") == expected


FAULTS = {
    "nothing": b"",
    "no stop": b"\x80\x02}",
    "protocol 4": b"\x80\x04}.",
    "no protocol": b"}.",
    "bytes after the stop": b"\x80\x02}.x",
    "two values": b"\x80\x02}}.",
    "no value": b"\x80\x02.",
    "a mark": b"\x80\x02(.",
    "value past a mark": b"\x80\x02}(R.",
    "tuple across a mark": b"\x80\x02N(N\x86.",
    "tuple without a mark": b"\x80\x02Nt.",
    "pop of nothing": b"\x80\x02\x85.",
    "opcode of protocol 4": b"\x80\x02\x8c\x01a.",
    "opcode that calls with keywords": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "INST": b"\x80\x02(ios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\no.",
    "EXT": b"\x80\x02\x82\x01.",
    "FLOAT in text": b"\x80\x02F1.0\n.",
    "global cut short": b"\x80\x02cos\nsystem",
    "global of builtins": b"\x80\x02cbuiltins\neval\n.",
    "dtype of nowhere": b"\x80\x02ctorch\nqint8\n.",
    "bytearray": b"\x80\x02c__builtin__\nbytearray\nK\x05\x85R.",
    "quantized tensor": b"\x80\x02ctorch._utils\n_rebuild_qtensor\n.",
    "dotted name": b"\x80\x02ctorch\n_utils._rebuild_tensor_v2\n.",
    "call of a string": b"\x80\x02X\x01\0\0\0a)R.",
    "call with a list": b"\x80\x02ccollections\nOrderedDict\n]R.",
    "OrderedDict with arguments": b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
    "Size of a string": b"\x80\x02ctorch\nSize\nX\x01\0\0\0a\x85R.",
    "build on a list": b"\x80\x02]}b.",
    "build with more than metadata": b"\x80\x02}}X\x01\0\0\0aNsb.",
    "append to a dict": b"\x80\x02}Na.",
    "append to a tuple": b"\x80\x02)Na.",
    "items of a list": b"\x80\x02]X\x01\0\0\0aNs.",
    "odd number of items": b"\x80\x02}(Nu.",
    "list as a key": b"\x80\x02}]Ns.",
    "tuple as a key": b"\x80\x02})Ns.",
    "unknown memo": b"\x80\x02h\x07.",
    "memo of a mark": b"\x80\x02(q\0.",
    "string that is not UTF-8": b"\x80\x02X\x01\0\0\0\xff.",
    "string cut short": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "string key of a storage missing": b"\x80\x02NQ.",
    "storage of another type": b"\x80\x02" + STORAGE.replace(b"FloatStorage", b"QInt8Storage") + b".",
    "storage with a number as key": b"\x80\x02" + STORAGE.replace(b"X\x01\0\0\x000", b"K\0") + b".",
    "offset is a boolean's neighbour": b"\x80\x02" + tensor(offset=b"N") + b".",
    "float in the shape": b"\x80\x02" + tensor(shape=b"G" + struct.pack(">d", 4.0) + b"\x85") + b".",
    "boolean in the shape": b"\x80\x02" + tensor(shape=b"\x88\x85") + b".",
    "list as shape": b"\x80\x02" + tensor(shape=b"]") + b".",
    "tensor without a storage": b"\x80\x02" + tensor(storage=b"N") + b".",
    "tensor with hooks": b"\x80\x02" + tensor(rest=b"\x89}X\x01\0\0\0aNs") + b".",
    "tensor with metadata": b"\x80\x02" + tensor(rest=b"\x89" + HOOKS + b"}X\x04\0\0\0conj\x88s") + b".",
    "tensor with too many arguments": b"\x80\x02" + tensor(rest=b"\x89" + HOOKS + b"}NN") + b".",
    "parameter of nothing": b"\x80\x02ctorch._utils\n_rebuild_parameter\nN\x88" + HOOKS + b"\x87R.",
    "parameter with hooks": b"\x80\x02ctorch._utils\n_rebuild_parameter\n" + tensor() + b"\x88}X\x01\0\0\0aNs\x87R.",
    "v3 with a typed storage": b"\x80\x02"
    + tensor(rest=b"\x89" + HOOKS + b"ctorch\nuint16\n").replace(b"_v2", b"_v3")
    + b".",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_anything_else_is_refused(fault: str) -> None:
    with pytest.raises(UnsafePickle) as caught:
        read_pickle(FAULTS[fault], "model.pt")
    assert caught.value.where == "model.pt"
    assert "weights_only" not in str(caught.value)


@given(
    st.binary(max_size=60)
    | st.lists(
        st.sampled_from(
            [
                b"(",
                b"t",
                b")",
                b"}",
                b"]",
                b"N",
                b"s",
                b"u",
                b"a",
                b"e",
                b"R",
                b"b",
                b"Q",
                b"q\0",
                b"h\0",
                b"K\1",
                b"\x85",
                b"\x86",
                b"\x87",
                G,
                HOOKS,
                STORAGE,
                tensor(),
            ]
        ),
        max_size=20,
    ).map(b"".join)
)
def test_any_bytes_are_a_value_or_an_unsafe_pickle(data: bytes) -> None:
    try:
        read_pickle(b"\x80\x02" + data + b".", "x")
    except UnsafePickle:
        return


def test_a_list_may_contain_itself() -> None:
    found = read_pickle(b"\x80\x02]q\0h\0a.", "x")
    assert isinstance(found, list)
    assert found[0] is found


def test_deep_values_do_not_exhaust_the_interpreter() -> None:
    found = read_pickle(b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".", "x")
    assert isinstance(found, list)


def test_memory_is_bounded_by_the_memo() -> None:
    data = b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", number) for number in range(1_000_001)) + b"."
    with pytest.raises(UnsafePickle, match="more than 1000000 values"):
        read_pickle(data, "x")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def test_keys_that_collide_as_integers_do_not_slow_a_dict_down() -> None:
    """All are multiples of the modulus of Python's hash of integers: each look would visit all keys before."""
    keys = (number * (2**61 - 1) for number in range(200_000))
    items = b"".join(b"\x8a\x0b" + key.to_bytes(11, "little") + b"N" for key in keys)
    found = read_pickle(b"\x80\x02}(" + items + b"u.", "x")
    assert isinstance(found, dict)
    assert len(found) == 200_000


def test_a_number_and_its_text_are_two_keys_and_no_json() -> None:
    data = b"\x80\x02}(" + text("5") + b"K\x01K\x05K\x02u."
    found = read_pickle(data, "x")
    assert found == {"5": 1, IntegerKey.of(5): 2}
    with pytest.raises(UnsafePickle, match="as a number and as a string"):
        find_state_dict({"a": found}, "x")


def test_dicts_that_hold_each_other_are_counted_once_each() -> None:
    """Three levels of 20,000 references each are eight million million visits."""
    shared: dict[object, object] = {}
    for _ in range(3):
        shared = {IntegerKey.of(number): shared for number in range(20_000)}
    with pytest.raises(UnsafePickle, match="more than 1000000 values"):
        find_state_dict({"a": shared}, "x")


def test_sizes_that_many_calls_share_are_not_read_for_each() -> None:
    """A tuple of a million numbers, and a hundred thousand calls with it."""
    sizes = b"(" + b"K\x01" * 1_000_000 + b"t\x85q\x00"
    calls = b"ctorch\nSize\nq\x01h\x00R" + b"h\x01h\x00R" * 100_000
    with pytest.raises(UnsafePickle, match="with arguments"):
        read_pickle(b"\x80\x02](" + sizes + calls + b"e.", "x")


def test_attributes_that_many_objects_share_are_not_read_for_each() -> None:
    state = b"}(" + b"".join(text(str(number)) + b"N" for number in range(10)) + b"uq\x00"
    with pytest.raises(UnsafePickle, match="sets attributes"):
        read_pickle(b"\x80\x02]" + state + b"a}h\x00b.", "x")


@pytest.mark.parametrize("others", [b"ctorch\nBFloat16Storage\n", b"ctorch.storage\nUntypedStorage\n"])
def test_a_storage_with_two_dtypes_is_refused(others: bytes) -> None:
    """Torch reads it with the dtype that it met first, so two readers may see two values."""
    first = STORAGE.replace(b"ctorch\nFloatStorage\n", b"ctorch\nHalfStorage\n")
    second = STORAGE.replace(b"ctorch\nFloatStorage\n", others)
    assert isinstance(read_pickle(b"\x80\x02](" + first * 2 + b"e.", "x"), list)
    with pytest.raises(UnsafePickle, match="two dtypes"):
        read_pickle(b"\x80\x02](" + first + second + b"e.", "x")


TREES = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=5),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 70), 1 << 70)
        | st.floats(allow_nan=False)
        | st.text(st.characters(codec="utf-8")),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
        ),
        max_leaves=12,
    ),
    max_size=5,
)


@given(TREES)
def test_what_is_written_is_read_by_us_and_by_python(tree: dict[str, object]) -> None:
    data = write_pickle(tree)
    assert read_pickle(data, "x") == tree
    assert pickle.loads(data) == tree
