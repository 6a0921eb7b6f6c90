"""rank_pattern and alpha_pattern: what PEFT's own function finds, in bounded time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat import load_adapter
from loraformat.budget import Budget
from loraformat.diagnostics import NOWHERE, in_file
from loraformat.errors import ConfigError
from loraformat.formats.peft.patterns import Ends, Inside, PatternKeys

WHERE = in_file("adapter_config.json", "rank_pattern")
MODULES = st.from_regex(r"[ab_]{1,3}(\.[ab_01]{1,3}){0,3}", fullmatch=True)
KEYS = st.from_regex(r"\^?[ab.]{1,4}(\*|\+|\||\\\.|\(a|b\)|[01])?[ab]{0,2}\$?", fullmatch=True)


@given(MODULES, st.lists(MODULES | KEYS, max_size=4, unique=True))
def test_the_first_key_that_matches_is_the_one_that_peft_finds(module: str, keys: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft.utils.other import get_pattern_key
    try:
        found = PatternKeys(NOWHERE, keys, Budget()).first_match(module)
    except ConfigError:
        return
    wanted = get_pattern_key(keys, module)
    assert (module if found is None else found) == wanted


@pytest.mark.parametrize("key", ["(.*)*\\.q_proj", "(?:[a-z0-9_.]+)+!", "((a*)*)*b", "(a|aa)+$"])
def test_nothing_hangs(key: str) -> None:
    """What hangs runs into the time limit of the suite."""
    assert PatternKeys(NOWHERE, [key], Budget()).first_match("model.layers.0.self_attn." + "a" * 400) in (None, key)


@pytest.mark.parametrize("key", ["(a)\\1", "(?=a)a", "(?i)a", "(" * 50 + ")" * 50, "a" * 5000 + "*", "a(", "[", "*"])
def test_what_could_hang_or_is_no_pattern_is_not_evaluated(key: str) -> None:
    with pytest.raises(ConfigError, match="not evaluated") as caught:
        PatternKeys(WHERE, [key], Budget())
    assert caught.value.location.file == "adapter_config.json"
    assert caught.value.location.path[:1] == ("rank_pattern",)


def test_many_modules_with_as_many_plain_keys_each_find_their_own() -> None:
    modules = [f"model.layers.{layer}.mlp.experts.{expert}.w1" for layer in range(60) for expert in range(50)]
    keys = PatternKeys(NOWHERE, modules, Budget())
    assert [keys.first_match(module) for module in modules] == modules


def test_too_many_steps_are_an_error() -> None:
    keys = PatternKeys(WHERE, ["(a|b)*" * 100], Budget(100_000))
    with pytest.raises(ConfigError, match="too large"):
        [keys.first_match("ab" * length) for length in range(1000)]


@pytest.mark.parametrize("spell", [lambda module: f"^{module}", lambda module: f"^{re.escape(module)}$", re.escape])
def test_twenty_thousand_anchored_keys_are_looked_up_like_plain_ones(spell: Callable[[str], str]) -> None:
    """The spelling of PEFT's own documentation: plain text, and each module costs a few steps, not one for each key."""
    modules = [f"model.layers.{n // 7}.self_attn.{'qkvoxyz'[n % 7]}_proj" for n in range(20_000)]
    keys = [spell(module) for module in modules]
    budget = Budget()
    table = PatternKeys(WHERE, keys, budget)
    assert [table.first_match(module) for module in modules] == keys
    assert Budget().left - budget.left < 100 * len(modules)


def test_an_anchored_key_means_the_whole_path() -> None:
    keys = PatternKeys(WHERE, ["^q_proj", "^a.q_proj"], Budget())
    assert keys.first_match("model.q_proj") is None
    assert keys.first_match("q_proj") == "^q_proj"
    assert keys.first_match("aXq_proj") == "^a.q_proj"


def test_an_escaped_dot_is_a_dot_and_nothing_else() -> None:
    keys = PatternKeys(WHERE, [r"a\.q"], Budget())
    assert (keys.first_match("m.a.q"), keys.first_match("m.aXq")) == (r"a\.q", None)


def test_keys_of_many_shapes_are_refused_and_not_compared_for_ever() -> None:
    """Dots that stand everywhere: each key has a shape of its own, so each must be tried for each module."""
    keys = ["".join("." if number >> bit & 1 else "a" for bit in range(15)) for number in range(20_000)]
    table = PatternKeys(WHERE, keys, Budget(1_000_000))
    with pytest.raises(ConfigError, match="too large"):
        [table.first_match(f"b{number:014}") for number in range(20_000)]


@given(MODULES, st.lists(MODULES, max_size=6, unique=True))
def test_names_select_the_modules_that_they_end(module: str, names: list[str]) -> None:
    assert Ends(names).of(module) == [name for name in names if f".{module}".endswith(f".{name}")]


@given(MODULES, st.lists(MODULES, max_size=6, unique=True))
def test_names_select_the_paths_of_modules_that_end_with_them(path: str, names: list[str]) -> None:
    parts = path.split(".")
    modules = [".".join(parts[: count + 1]) for count in range(len(parts))]
    assert Inside(names, Budget()).of(path) == {name for name in names if any(m.endswith(name) for m in modules)}


def test_many_names_for_many_modules_are_looked_up_and_not_compared() -> None:
    """What compares each with each runs into the time limit of the suite."""
    names = [f"layers.{number}.mlp.experts" for number in range(50_000)]
    paths = [f"model.layers.{number}.mlp.experts.w1" for number in range(20_000)]
    inside, ends = Inside(names, Budget()), Ends(names)
    assert all(inside.of(path) == {names[number]} for number, path in enumerate(paths))
    assert all(ends.of(path.removesuffix(".w1")) == [names[number]] for number, path in enumerate(paths))


def test_names_of_many_lengths_for_long_paths_are_refused() -> None:
    names = [".".join("a" * count) for count in range(1, 900)]
    inside = Inside(names, Budget(100_000), "modules_to_save")
    with pytest.raises(ConfigError, match="too many names"):
        [inside.of(".".join("a" * 900)) for _ in range(100)]


def test_a_saved_module_is_any_whose_path_ends_with_its_name(tmp_path: Path) -> None:
    """PEFT needs no dot before the name: "norm" saves `input_norm` too, and the config does name it."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.q, self.input_norm, self.norm = nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)

    model = get_peft_model(Block(), LoraConfig(target_modules=["q"], modules_to_save=["norm"], r=2))
    model.save_pretrained(str(tmp_path / "adapter"))
    adapter = load_adapter(tmp_path / "adapter")
    assert {"input_norm.weight", "norm.weight"} <= adapter.updates.keys()
    assert "LF224" not in {note.code for note in adapter.notes}
