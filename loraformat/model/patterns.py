r"""Regular expressions out of a config, matched in linear time or not at all: nothing in a file can make us hang.

Supported is what names of modules need: literals, `.`, character classes, `\d \w \s`, groups, `|`, `^ $`, and the
quantifiers `* + ? {m,n}`, lazy or greedy. Look-around, back references, flags and `\b` are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias, Union

_MOST_CHARACTERS = 4000
_MOST_INSTRUCTIONS = 4000
_DEEPEST = 40
_LONGEST_TEXT = 2000

Test: TypeAlias = Callable[[str], bool]


def is_linear(pattern: str) -> bool:
    """Whether `fullmatch` can evaluate the pattern."""
    return _compiled(pattern) is not None


def fullmatch(pattern: str, text: str) -> bool | None:
    """Whether the whole text matches, as `re.fullmatch` says; None where it was not evaluated.

    Time is at most the length of the text times the size of the pattern, whatever the pattern: all alternatives are
    followed at once (Thompson's construction).
    """
    program = _compiled(pattern)
    if program is None or len(text) > _LONGEST_TEXT or "\n" in text:
        return None
    states = _closure(program, [0], 0, len(text))
    for position, character in enumerate(text, start=1):
        ahead = [state + 1 for state in states if _accepts(program[state], character)]
        states = _closure(program, ahead, position, len(text))
    return any(isinstance(program[state], _Accept) for state in states)


class _Unsupported(Exception):
    """The pattern is outside the subset."""


@dataclass(frozen=True, slots=True)
class _Character:
    test: Test


@dataclass(frozen=True, slots=True)
class _Anchor:
    at_start: bool


@dataclass(frozen=True, slots=True)
class _Split:
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Accept:
    pass


_Instruction: TypeAlias = Union[_Character, _Anchor, _Split, _Accept]


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


_Node: TypeAlias = Union[_Character, _Anchor, _Sequence, _Choice, _Repeat]


def _accepts(instruction: _Instruction, character: str) -> bool:
    return isinstance(instruction, _Character) and instruction.test(character)


def _closure(program: tuple[_Instruction, ...], start: Iterable[int], position: int, length: int) -> set[int]:
    """All states that are reached without reading a character."""
    seen: set[int] = set()
    waiting = list(start)
    while waiting:
        state = waiting.pop()
        if state in seen:
            continue
        seen.add(state)
        instruction = program[state]
        if isinstance(instruction, _Split):
            waiting.extend(instruction.targets)
        elif isinstance(instruction, _Anchor) and position == (0 if instruction.at_start else length):
            waiting.append(state + 1)
    return seen


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> tuple[_Instruction, ...] | None:
    if len(pattern) > _MOST_CHARACTERS:
        return None
    try:
        node = _Parser(pattern).whole()
        program: list[_Instruction] = []
        _emit(node, program)
    except _Unsupported:
        return None
    return (*program, _Accept())


def _emit(node: _Node, program: list[_Instruction]) -> None:
    if len(program) > _MOST_INSTRUCTIONS:
        raise _Unsupported
    match node:
        case _Character() | _Anchor():
            program.append(node)
        case _Sequence(parts):
            for part in parts:
                _emit(part, program)
        case _Choice(branches):
            _emit_choice(branches, program)
        case _Repeat():
            _emit_repeat(node, program)


def _emit_choice(branches: tuple[_Node, ...], program: list[_Instruction]) -> None:
    fork = len(program)
    program.append(_Split(()))
    starts, ends = [], []
    for branch in branches:
        starts.append(len(program))
        _emit(branch, program)
        ends.append(len(program))
        program.append(_Split(()))
    program[fork] = _Split(tuple(starts))
    for end in ends:
        program[end] = _Split((len(program),))


def _emit_repeat(repeat: _Repeat, program: list[_Instruction]) -> None:
    for _ in range(repeat.least):
        _emit(repeat.node, program)
    if repeat.most is None:
        fork = len(program)
        program.append(_Split(()))
        _emit(repeat.node, program)
        program.append(_Split((fork,)))
        program[fork] = _Split((fork + 1, len(program)))
        return
    forks = []
    for _ in range(repeat.most - repeat.least):
        forks.append(len(program))
        program.append(_Split(()))
        _emit(repeat.node, program)
    for fork in forks:
        program[fork] = _Split((fork + 1, len(program)))


_CLASSES: dict[str, Test] = {
    "d": str.isdecimal,
    "D": lambda c: not c.isdecimal(),
    "w": lambda c: c.isalnum() or c == "_",
    "W": lambda c: not (c.isalnum() or c == "_"),
    "s": str.isspace,
    "S": lambda c: not c.isspace(),
}


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
        if isinstance(node, _Anchor) or self.peek() in ("*", "+", "?") or (self.peek() == "{" and self.bounds()):
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
        if end < 0 or not (low or comma) or not all(digits == "" or _is_small(digits) for digits in (low, high)):
            return None
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
            return _Character(self.character_class())
        if character in ("^", "$"):
            return _Anchor(character == "^")
        if character == ".":
            return _Character(lambda c: c != "\n")
        if character == "\\":
            return self.escape()
        if character in "*+?" or (character == "{" and self.is_quantifier()):
            raise _Unsupported
        return _Character(character.__eq__)

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
            return _Anchor(at_start=True)
        if self.skip("Z"):
            return _Anchor(at_start=False)
        return _Character(self.escaped())

    def escaped(self) -> Test:
        character = self.take()
        if character in _CLASSES:
            return _CLASSES[character]
        if character.isalnum():
            raise _Unsupported
        return character.__eq__

    def character_class(self) -> Test:
        negated = self.skip("^")
        tests: list[Test] = []
        while not self.skip("]") or not tests:
            tests.append(self.class_item("]" if self.pattern[self.at - 1] == "]" and not tests else self.take()))
        return (lambda c: not any(test(c) for test in tests)) if negated else (lambda c: any(test(c) for test in tests))

    def class_item(self, first: str) -> Test:
        if first == "\\" and self.peek() in _CLASSES:
            return _CLASSES[self.take()]
        low = self.class_literal(first)
        if self.peek() != "-" or self.pattern[self.at + 1 : self.at + 2] in ("", "]"):
            return low.__eq__
        self.take()
        high = self.class_literal(self.take())
        if high < low:
            raise _Unsupported
        return lambda c: low <= c <= high

    def class_literal(self, character: str) -> str:
        if character != "\\":
            return character
        literal = self.take()
        if literal.isalnum():
            raise _Unsupported
        return literal


def _is_small(digits: str) -> bool:
    return digits.isascii() and digits.isdigit() and len(digits) <= 3
