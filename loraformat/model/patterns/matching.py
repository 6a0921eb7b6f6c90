r"""Regular expressions from a config, matched in linear time or not evaluated, so that no file can make a run hang.

Supported is what names of modules need: literals, `.`, character classes, `\d \w \s`, groups, `|`, `^ $`, and the
quantifiers `* + ? {m,n}`, lazy or greedy. Look-around, back references, flags and `\b` are not.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import cached_property

from loraformat.budget import Budget
from loraformat.model.patterns.program import Accept, Anchor, Character, Instruction, Split, compiled

_LONGEST_TEXT = 2000
_FIXED_COST = 20
_MOST_KEPT = 2_000_000  # states of the sets that a matcher remembers, two bytes each


def is_linear(pattern: str) -> bool:
    """Whether `fullmatch` can evaluate the pattern."""
    return compiled(pattern).instructions is not None


def fullmatch(pattern: str, text: str) -> bool | None:
    """Whether the whole text matches, as `re.fullmatch` says; None where it was not evaluated."""
    return Matcher(pattern, Budget()).fullmatch(text)


class Matcher:
    """One pattern for many texts, with the budget of the run.

    Time is at most the length of the text times the size of the pattern, whatever the pattern: all alternatives are
    followed at once (Thompson's construction). Sets of states and the ways between them are remembered, so that for
    names that begin alike a character costs one look.

    Attributes:
        is_linear: whether the pattern can be evaluated at all.
    """

    def __init__(self, pattern: str, budget: Budget) -> None:
        self._budget = budget
        program = compiled(pattern) if budget.left >= 0 else None
        self.is_linear = program is not None and program.instructions is not None
        self._program = program.instructions if program is not None and budget.spend(program.cost) else None
        self._sets: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        self._moves: dict[tuple[int, str], int] = {}
        self._ends: dict[int, bool] = {}
        self._kept = 0

    def fullmatch(self, text: str) -> bool | None:
        """Whether the whole text matches, as `re.fullmatch` says; None where it was not evaluated."""
        cost = _FIXED_COST + len(text)
        if self._program is None or len(text) > _LONGEST_TEXT or "\n" in text or not self._budget.spend(cost):
            return None
        if not text:
            return self._accepts(self._closure([0], at_start=True, at_end=True))
        number = self._number(self._first)
        for character in text:
            following = self._moves.get((number, character))
            if following is None:
                following = self._move(number, character)
            number = following
            if self._budget.left < 0:
                return None
        if number not in self._ends:
            self._ends[number] = self._accepts(self._closure(_states(self._sets[number]), at_start=False, at_end=True))
        return self._ends[number]

    @cached_property
    def _first(self) -> bytes:
        return _key(self._closure([0], at_start=True, at_end=False))

    def _accepts(self, states: Iterable[int]) -> bool:
        assert self._program is not None
        return any(isinstance(self._program[state], Accept) for state in states)

    def _move(self, number: int, character: str) -> int:
        """The set that a character leads to from another one."""
        assert self._program is not None
        key = self._sets[number]
        states = _states(key)
        ahead = [state + 1 for state in states if _accepts(self._program[state], character)]
        reached = _key(self._closure(ahead, at_start=False, at_end=False))
        self._budget.spend(len(states))
        if self._kept > _MOST_KEPT:
            self._sets, self._numbers, self._moves, self._ends, self._kept = [], {}, {}, {}, 0
            number = self._number(key)
        following = self._moves[number, character] = self._number(reached)
        return following

    def _number(self, key: bytes) -> int:
        number = self._numbers.setdefault(key, len(self._sets))
        if number == len(self._sets):
            self._sets.append(key)
            self._kept += len(key) // 2
        return number

    def _closure(self, start: Iterable[int], *, at_start: bool, at_end: bool) -> set[int]:
        """All states that are reached without reading a character."""
        assert self._program is not None
        seen: set[int] = set()
        waiting = list(start)
        looked_at = 0
        while waiting:
            state = waiting.pop()
            looked_at += 1
            if state in seen:
                continue
            seen.add(state)
            instruction = self._program[state]
            if isinstance(instruction, Split):
                waiting.extend(instruction.targets)
            elif isinstance(instruction, Anchor) and (at_start if instruction.at_start else at_end):
                waiting.append(state + 1)
        self._budget.spend(_FIXED_COST + looked_at)
        return seen


def _key(states: Iterable[int]) -> bytes:
    """A set of states in few bytes: programs are short enough for two each."""
    return array("H", sorted(states)).tobytes()


def _states(key: bytes) -> memoryview:
    return memoryview(key).cast("H")


def _accepts(instruction: Instruction, character: str) -> bool:
    return isinstance(instruction, Character) and instruction.test(character)
