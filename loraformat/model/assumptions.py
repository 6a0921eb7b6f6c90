"""Values that the caller states because an adapter's files do not (`--assume KEY=VALUE`), a field each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from loraformat.diagnostics import show
from loraformat.errors import UsageError

_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_KEY = "key"


@dataclass(frozen=True, slots=True)
class Key:
    """How a value is given.

    Attributes:
        usage: as the help has it.
        expected: what it may be, in words.
        parse: a JSON value, or a text that is none → the value. Raises ValueError: it is something else.
    """

    usage: str
    expected: str
    parse: Callable[[object], Any]


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _integer(value: object) -> int:
    number = _number(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _flag_or_names(value: object) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ValueError


def _flags(value: object) -> tuple[bool, ...]:
    if isinstance(value, list) and value and all(isinstance(flag, bool) for flag in value):
        return tuple(value)
    raise ValueError


def _task(value: object) -> str:
    if value not in _TASKS:
        raise ValueError
    return str(value)


_COMPONENT = re.compile(r"(unet|prior|transformer|text_encoder|image_encoder)(_[2-9])?")


def _component(value: object) -> str:
    if not isinstance(value, str) or not _COMPONENT.fullmatch(value):
        raise ValueError
    return value


def _given(usage: str, expected: str, parse: Callable[[object], Any]) -> Any:  # noqa: ANN401 - as dataclasses.field
    return field(default=None, metadata={_KEY: Key(usage, expected, parse)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Values that an adapter's files do not state. Contradicting the files raises AssumptionContradicted (LF024).

    >>> import loraformat
    >>> said = loraformat.Assumptions(alpha=1.0)
    >>> adapter = loraformat.load_adapter("fixtures/minigpt/lora_adapter", assumptions=said)
    >>> adapter.updates["blocks.0.attention.q_proj.weight"][0].scale
    0.25

    Attributes:
        alpha, rank, scale: alpha and rank as in alpha / rank; `scale` is the factor itself.
        fan_in_fan_out: whether the base stores weights as (in, out), or the modules that it stores so, by their ends.
        enable_lora: which of the equal parts of a fused layer are adapted: (True, False, True) for query and value.
        component: pipeline component, for a file that does not state it: "transformer_2" for the low-noise expert of
            Wan 2.2.
        task: the task of the class that the adapter was trained on, as PEFT's task type: "SEQ_CLS".
    """

    alpha: float | None = _given("alpha=", "a finite number", _number)
    rank: int | None = _given("rank=", "an integer", _integer)
    scale: float | None = _given("scale=", "a finite number", _number)
    fan_in_fan_out: bool | tuple[str, ...] | None = _given(
        "fan_in_fan_out= (true, false or a list of modules)", "true, false or a list of module names", _flag_or_names
    )
    enable_lora: tuple[bool, ...] | None = _given("enable_lora=[true,false,true]", "a list of true and false", _flags)
    component: str | None = _given("component=transformer_2", "the name of a component of a pipeline", _component)
    task: str | None = _given("task=SEQ_CLS", "SEQ_CLS, TOKEN_CLS or QUESTION_ANS", _task)

    def __post_init__(self) -> None:
        """Raises: UsageError (LF021): alpha or scale is not a finite number."""
        for name in ("alpha", "scale"):
            value: object = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise UsageError(f"expected a finite number, found {show(value, 40)}", where=name)

    def said(self) -> dict[str, Any]:
        """Every key with its value, None where nothing was said."""
        return {name: getattr(self, name) for name in KEYS}


KEYS: dict[str, Key] = {each.name: each.metadata[_KEY] for each in fields(Assumptions)}
USAGE = ", ".join(key.usage for key in KEYS.values())


def with_alpha(alpha: float | None, assumptions: Assumptions | None) -> Assumptions:
    """`--alpha` and `--assume` as one; UsageError (LF021) where they disagree."""
    known = assumptions or Assumptions()
    if alpha is None:
        return known
    if known.alpha is not None and known.alpha != alpha:
        raise UsageError(f"--alpha is {alpha:g}, but --assume states alpha={known.alpha:g}", where="command line")
    return replace(known, alpha=alpha)


def parse_value(key: str, text: str) -> Any:  # noqa: ANN401 - of the key's own type
    """The value of a key, written as JSON or, for a task, as it is. Raises ValueError: it may not have that value."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return KEYS[key].parse(value)
