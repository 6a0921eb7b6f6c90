"""The grammar of `model.patterns`: a pattern becomes a program of few kinds of instructions, or is not supported."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias, Union

_MOST_CHARACTERS = 4000
_MOST_INSTRUCTIONS = 4000
_MOST_EMITTED = 20_000  # groups that hold nothing emit no instruction, and may be repeated too
_DEEPEST = 40

Test: TypeAlias = Callable[[str], bool]


class _Unsupported(Exception):
    """The pattern is outside the subset."""


@dataclass(frozen=True, slots=True)
class Character:
    """Reads one character that passes a test."""

    test: Test


@dataclass(frozen=True, slots=True)
class Anchor:
    """Goes on at the start of the text, or at its end."""

    at_start: bool


@dataclass(frozen=True, slots=True)
class Split:
    """Goes on at several places."""

    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Accept:
    """The text matches if it ends here."""


Instruction: TypeAlias = Union[Character, Anchor, Split, Accept]


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    branches: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    node: _Node
    least: int
    most: int | None


_Node: TypeAlias = Union[Character, Anchor, _Sequence, _Choice, _Repeat]


@dataclass(frozen=True, slots=True)
class Program:
    """`instructions`, None where the pattern is outside the subset, and `cost`, the steps that it took to make them."""

    instructions: tuple[Instruction, ...] | None
    cost: int


@lru_cache(maxsize=256)
def compiled(pattern: str) -> Program:
    """The program of a pattern."""
    if len(pattern) > _MOST_CHARACTERS:
        return Program(None, 1)
    emitter = _Emitter()
    try:
        emitter.emit(_Parser(pattern).whole())
    except _Unsupported:
        return Program(None, _cost(pattern, emitter))
    return Program((*emitter.program, Accept()), _cost(pattern, emitter))


def _cost(pattern: str, emitter: _Emitter) -> int:
    """Reading a character of a pattern and writing an instruction each take the time of ten looks at a state."""
    return 10 * (len(pattern) + emitter.emitted)


class _Emitter:
    """Writes the instructions of a tree of nodes, one after the other."""

    def __init__(self) -> None:
        self.program: list[Instruction] = []
        self.emitted = 0

    def emit(self, node: _Node) -> None:
        self.emitted += 1
        if len(self.program) > _MOST_INSTRUCTIONS or self.emitted > _MOST_EMITTED:
            raise _Unsupported
        match node:
            case Character() | Anchor():
                self.program.append(node)
            case _Sequence(parts):
                for part in parts:
                    self.emit(part)
            case _Choice(branches):
                self.emit_choice(branches)
            case _Repeat():
                self.emit_repeat(node)

    def fork(self) -> int:
        """The place of an instruction whose targets are not known yet."""
        self.program.append(Split(()))
        return len(self.program) - 1

    def emit_choice(self, branches: tuple[_Node, ...]) -> None:
        fork = self.fork()
        starts, ends = [], []
        for branch in branches:
            starts.append(len(self.program))
            self.emit(branch)
            ends.append(self.fork())
        self.program[fork] = Split(tuple(starts))
        for end in ends:
            self.program[end] = Split((len(self.program),))

    def emit_repeat(self, repeat: _Repeat) -> None:
        for _ in range(repeat.least):
            self.emit(repeat.node)
        if repeat.most is None:
            fork = self.fork()
            self.emit(repeat.node)
            self.program.append(Split((fork,)))
            self.program[fork] = Split((fork + 1, len(self.program)))
            return
        forks = []
        for _ in range(repeat.most - repeat.least):
            forks.append(self.fork())
            self.emit(repeat.node)
        for fork in forks:
            self.program[fork] = Split((fork + 1, len(self.program)))


_CLASSES: dict[str, Test] = {
    "d": str.isdecimal,
    "D": lambda c: not c.isdecimal(),
    "w": lambda c: c.isalnum() or c == "_",
    "W": lambda c: not (c.isalnum() or c == "_"),
    "s": str.isspace,
    "S": lambda c: not c.isspace(),
}


_Range: TypeAlias = tuple[str, str]


def _class_test(items: Sequence[Test | _Range], *, negated: bool) -> Test:
    """Whether a character is in a class: as fast for a class of a thousand ranges as for one of two."""
    ranges: list[_Range] = []
    for low, high in sorted(item for item in items if isinstance(item, tuple)):
        if ranges and low <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(high, ranges[-1][1]))
        else:
            ranges.append((low, high))
    starts, ends = [low for low, _ in ranges], [high for _, high in ranges]
    tests = list(dict.fromkeys(item for item in items if not isinstance(item, tuple)))

    def test(character: str) -> bool:
        at = bisect_right(starts, character) - 1
        found = (at >= 0 and character <= ends[at]) or any(each(character) for each in tests)
        return found is not negated

    return test


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at, self.depth = pattern, 0, 0

    def whole(self) -> _Node:
        node = self.choice()
        if self.at < len(self.pattern):
            raise _Unsupported
        return node

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self) -> str:
        character = self.peek()
        if not character:
            raise _Unsupported
        self.at += 1
        return character

    def skip(self, text: str) -> bool:
        found = self.pattern.startswith(text, self.at)
        self.at += len(text) if found else 0
        return found

    def choice(self) -> _Node:
        branches = [self.sequence()]
        while self.skip("|"):
            branches.append(self.sequence())
        return branches[0] if len(branches) == 1 else _Choice(tuple(branches))

    def sequence(self) -> _Node:
        parts: list[_Node] = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.quantified(self.atom()))
        return _Sequence(tuple(parts))

    def quantified(self, node: _Node) -> _Node:
        bounds = self.bounds()
        if bounds is None:
            return node
        self.skip("?")
        if isinstance(node, Anchor) or self.peek() in ("*", "+", "?") or (self.peek() == "{" and self.bounds()):
            raise _Unsupported
        return _Repeat(node, *bounds)

    def bounds(self) -> tuple[int, int | None] | None:
        for sign, found in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.skip(sign):
                return found
        return self.braces() if self.peek() == "{" else None

    def braces(self) -> tuple[int, int | None] | None:
        end = self.pattern.find("}", self.at)
        low, comma, high = self.pattern[self.at + 1 : max(end, self.at + 1)].partition(",")
        if end < 0 or not (low or comma) or not all(_are_digits(text) for text in (low, high)):
            return None
        if not all(text == "" or _is_small(text) for text in (low, high)):
            raise _Unsupported
        self.at = end + 1
        least = int(low or 0)
        most = (int(high) if high else None) if comma else least
        if most is not None and most < least:
            raise _Unsupported
        return least, most

    def atom(self) -> _Node:
        character = self.take()
        if character == "(":
            return self.group()
        if character == "[":
            return Character(self.character_class())
        if character in ("^", "$"):
            return Anchor(character == "^")
        if character == ".":
            return Character(lambda c: c != "\n")
        if character == "\\":
            return self.escape()
        if character in "*+?" or (character == "{" and self.is_quantifier()):
            raise _Unsupported
        return Character(character.__eq__)

    def is_quantifier(self) -> bool:
        """Whether the brace just taken begins a quantifier, which has nothing to repeat here."""
        self.at -= 1
        found = self.braces() is not None
        self.at += 0 if found else 1
        return found

    def group(self) -> _Node:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise _Unsupported
        if self.skip("?P<"):
            end = self.pattern.find(">", self.at)
            if end < 0 or not self.pattern[self.at : end].isidentifier():
                raise _Unsupported
            self.at = end + 1
        elif self.peek() == "?" and not self.skip("?:"):
            raise _Unsupported
        node = self.choice()
        if self.take() != ")":
            raise _Unsupported
        self.depth -= 1
        return node

    def escape(self) -> _Node:
        if self.skip("A"):
            return Anchor(at_start=True)
        if self.skip("Z"):
            return Anchor(at_start=False)
        return Character(self.escaped())

    def escaped(self) -> Test:
        character = self.take()
        if character in _CLASSES:
            return _CLASSES[character]
        if character.isalnum():
            raise _Unsupported
        return character.__eq__

    def character_class(self) -> Test:
        negated = self.skip("^")
        items: list[Test | _Range] = []
        while not self.skip("]") or not items:
            items.append(self.class_item("]" if self.pattern[self.at - 1] == "]" and not items else self.take()))
        return _class_test(items, negated=negated)

    def class_item(self, first: str) -> Test | _Range:
        if first == "\\" and self.peek() in _CLASSES:
            found = _CLASSES[self.take()]
            if self.begins_range():
                raise _Unsupported
            return found
        low = self.class_literal(first)
        if not self.begins_range():
            return low, low
        self.take()
        high = self.class_literal(self.take())
        if high < low:
            raise _Unsupported
        return low, high

    def begins_range(self) -> bool:
        """Whether a hyphen follows that is not the last character of its class."""
        return self.peek() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("", "]")

    def class_literal(self, character: str) -> str:
        if character != "\\":
            return character
        literal = self.take()
        if literal.isalnum():
            raise _Unsupported
        return literal


def _are_digits(text: str) -> bool:
    """What `re` takes for a bound of a repeat, or for none; with anything else the brace stands for itself."""
    return text == "" or (text.isascii() and text.isdigit())


def _is_small(digits: str) -> bool:
    return digits.isascii() and digits.isdigit() and len(digits) <= 3
