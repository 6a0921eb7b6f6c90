"""combine_crc32 against zlib.crc32 of the whole."""

import zlib
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from loraformat.containers import combine_crc32


@given(st.binary(max_size=3000), st.binary(max_size=3000))
def test_two_parts_give_the_checksum_of_the_whole(first: bytes, second: bytes) -> None:
    combined = combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second))
    assert combined == zlib.crc32(first + second)


def test_long_parts_need_no_bytes() -> None:
    zeros = bytes(1 << 24)
    assert combine_crc32(zlib.crc32(b"x"), zlib.crc32(zeros), 1 << 24) == zlib.crc32(b"x" + zeros)
    assert combine_crc32(zlib.crc32(b"x"), 0, 0) == zlib.crc32(b"x")


def test_windows_may_finish_in_any_order() -> None:
    windows = [b"abc", b"", b"defgh", b"i"]
    for order in permutations(range(4)):
        found = {number: zlib.crc32(windows[number]) for number in order}
        total = 0
        for number, window in enumerate(windows):
            total = combine_crc32(total, found[number], len(window))
        assert total == zlib.crc32(b"abcdefghi")
