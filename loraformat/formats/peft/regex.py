"""Regular expressions of configs, matched in time proportional to text times pattern, whatever the pattern.

Python's `re` backtracks, so `(.*)*x` in a config would hang whoever evaluates it. Here a pattern becomes an automaton
whose states are followed all at once. What an automaton cannot do (backreferences, lookaround) and what configs do not
need (inline flags) is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

MAX_PATTERN = 4_096
MAX_STATES = 20_000
MAX_DEPTH = 100
MAX_REPEAT = 1_000

Test = Callable[[str], bool]

_CLASSES: dict[str, Test] = {
    "d": str.isdecimal,
    "D": lambda c: not c.isdecimal(),
    "w": lambda c: c.isalnum() or c == "_",
    "W": lambda c: not (c.isalnum() or c == "_"),
    "s": str.isspace,
    "S": lambda c: not c.isspace(),
}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}


class NotEvaluated(Exception):
    """The pattern is outside of what is evaluated; the text says why."""


@dataclass(slots=True)
class _State:
    """One state: `test` guards the way to `next`; `free` are ways without a character; `anchor` is "^", "$" or ""."""

    test: Test | None = None
    anchor: str = ""
    free: list[int] = field(default_factory=list)
    next: int = -1


@dataclass(slots=True)
class _Parser:
    text: str
    at: int = 0
    depth: int = 0
    states: list[_State] = field(default_factory=list)

    def new(self, test: Test | None = None, anchor: str = "") -> int:
        if len(self.states) >= MAX_STATES:
            raise NotEvaluated(f"it needs more than {MAX_STATES} states")
        self.states.append(_State(test, anchor))
        return len(self.states) - 1

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self) -> str:
        self.at += 1
        return self.text[self.at - 1 : self.at]

    def alternatives(self) -> tuple[int, int]:
        """A fragment as (first state, last state)."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotEvaluated(f"groups are nested more than {MAX_DEPTH} deep")
        first, last = self.new(), self.new()
        while True:
            start, end = self.sequence()
            self.states[first].free.append(start)
            self.states[end].free.append(last)
            if self.peek() != "|":
                break
            self.take()
        self.depth -= 1
        return first, last

    def sequence(self) -> tuple[int, int]:
        first = last = self.new()
        while self.peek() not in ("", "|", ")"):
            start, end = self.quantified()
            self.states[last].free.append(start)
            last = end
        return first, last

    def quantified(self) -> tuple[int, int]:
        begin = self.at
        fragment = self.atom()
        stop = self.at
        low, high = self.bounds()
        if (low, high) == (1, 1):
            return fragment
        return self.repeat(begin, stop, low, high)

    def bounds(self) -> tuple[int, int | None]:
        sign = self.peek()
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if sign in simple and sign:
            self.take()
            found = simple[sign]
        elif sign == "{":
            found = self.braces()
        else:
            return 1, 1
        if self.peek() in ("?", "+"):
            self.take()  # lazy and possessive change which match is found, not (here) whether
        if self.peek() and self.peek() in "*+?{":
            raise NotEvaluated("a quantifier follows a quantifier")
        return found

    def braces(self) -> tuple[int, int | None]:
        end = self.text.find("}", self.at)
        low, comma, high = self.text[self.at + 1 : end].partition(",") if end > 0 else ("x", "", "")
        if not (low or comma) or (not (low + high).isdecimal() and low + high):
            raise NotEvaluated("a brace that is no repetition")
        self.at = end + 1
        least = int(low or 0)
        most = int(high) if high else None if comma else least
        if max(least, most or 0) > MAX_REPEAT or (most is not None and most < least):
            raise NotEvaluated(f"repetitions must lie within 0 and {MAX_REPEAT}")
        return least, most

    def repeat(self, begin: int, stop: int, low: int, high: int | None) -> tuple[int, int]:
        """The atom at text[begin:stop], compiled anew for each copy."""
        after = self.at
        first = last = self.new()
        copies = low + 1 if high is None else high
        end = self.new()
        for number in range(copies):
            self.at = begin
            start, out = self.atom()
            assert self.at == stop
            if number >= low:
                self.states[last].free.append(end)
            self.states[last].free.append(start)
            if high is None and number == low:
                self.states[out].free.append(last)
            last = out
        self.states[last].free.append(end)
        self.at = after
        return first, end

    def atom(self) -> tuple[int, int]:
        sign = self.take()
        if sign == "(":
            return self.group()
        if sign in ("^", "$"):
            state = self.new(anchor=sign)
            return self.close(state)
        if sign and sign in "*+?{":
            raise NotEvaluated("a quantifier without anything before it")
        test = self.test(sign)
        return self.close(self.new(test))

    def close(self, state: int) -> tuple[int, int]:
        end = self.new()
        self.states[state].next = end
        return state, end

    def group(self) -> tuple[int, int]:
        if self.peek() == "?":
            if self.text[self.at : self.at + 2] != "?:":
                raise NotEvaluated("a group of the kind (?…) other than (?:…)")
            self.at += 2
        fragment = self.alternatives()
        if self.take() != ")":
            raise NotEvaluated("a parenthesis is not closed")
        return fragment

    def test(self, sign: str) -> Test:
        if sign == ".":
            return lambda c: c != "\n"
        if sign == "[":
            return self.char_class()
        if sign == "\\":
            return self.escape()
        return sign.__eq__

    def escape(self) -> Test:
        sign = self.take()
        if sign in _CLASSES:
            return _CLASSES[sign]
        if sign in _CONTROLS:
            return _CONTROLS[sign].__eq__
        if not sign or sign.isalnum():
            raise NotEvaluated(f"the escape \\{sign}")
        return sign.__eq__

    def char_class(self) -> Test:
        negated = self.peek() == "^"
        self.at += negated
        tests: list[Test] = []
        while self.peek() != "]" or not tests:
            if not self.peek():
                raise NotEvaluated("a character class is not closed")
            tests.append(self.class_item())
        self.take()
        return lambda c: any(test(c) for test in tests) != negated

    def class_item(self) -> Test:
        sign = self.take()
        if sign == "\\":
            return self.escape()
        if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("", "]", "\\"):
            self.take()
            high = self.take()
            return lambda c: sign <= c <= high
        return sign.__eq__


@dataclass(frozen=True, slots=True)
class Automaton:
    """A compiled pattern."""

    states: list[_State]
    first: int
    last: int

    def matches(self, text: str) -> bool:
        """Whether all of `text` matches; `$` also stands before a final line end, as in `re`."""
        current = self._spread({self.first}, text, 0)
        for at, sign in enumerate(text):
            reached = {
                state.next
                for state in map(self.states.__getitem__, current)
                if state.test is not None and state.test(sign)
            }
            current = self._spread(reached, text, at + 1)
            if not current:
                return False
        return self.last in current

    def _spread(self, reached: set[int], text: str, at: int) -> set[int]:
        """All states that can be reached without a character."""
        seen, waiting = set(reached), list(reached)
        while waiting:
            state = self.states[waiting.pop()]
            ways = list(state.free)
            if state.anchor and _holds(state.anchor, text, at):
                ways.append(state.next)
            waiting.extend(way for way in ways if way not in seen)
            seen.update(ways)
        return seen


def _holds(anchor: str, text: str, at: int) -> bool:
    if anchor == "^":
        return at == 0
    return at == len(text) or (at == len(text) - 1 and text[at] == "\n")


def compile_pattern(pattern: str) -> Automaton:
    """The automaton of a pattern. Raises NotEvaluated."""
    if len(pattern) > MAX_PATTERN:
        raise NotEvaluated(f"it has {len(pattern)} characters, at most {MAX_PATTERN} are evaluated")
    parser = _Parser(pattern)
    first, last = parser.alternatives()
    if parser.at < len(pattern):
        raise NotEvaluated("a parenthesis is not opened")
    return Automaton(parser.states, first, last)
