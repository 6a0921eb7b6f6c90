"""The factor of every update is computed again from what its format's files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merger.checkpoints import low_rank, save_base
from safetensors.torch import save_file

from loraformat.io import open_adapter
from loraformat.jobs.merge import merge
from loraformat.merger import AdapterSource, verify
from loraformat.merger.verify.reference import scales
from loraformat.merger.verify.reference.scales import Scales, scale_used
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.results.verbs import Checked
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, LowRank, Scaled

GOOD = Path(__file__).parents[3] / "fixtures" / "good"
CASES = sorted(path.parent.relative_to(GOOD).as_posix() for path in GOOD.glob("*/*/expect.json"))


def said(adapter: Adapter, source: AdapterSource) -> dict[str, float | None]:
    formulas = Scales(adapter, source)
    return {weight: formulas.of(weight, update) for weight, chain in adapter.updates.items() for update in chain}


def peft(folder: Path, modules: dict[str, int], **settings: Any) -> str:
    """A PEFT folder with layers of the given ranks."""
    folder.mkdir()
    tensors = {}
    for module, rank in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(rank, 6)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(8, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": sorted(modules), **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("case", CASES)
def test_a_formula_gives_the_scale_of_every_fixture(case: str) -> None:
    opened = open_adapter(str(GOOD / case))
    formulas = Scales(opened.adapter, AdapterSource(opened.uri, opened.format.NAME))
    for weight, chain in opened.adapter.updates.items():
        for update in chain:
            found = formulas.of(weight, update)
            is_scaled, scale = scale_used(update)
            if is_scaled and scale is not None:
                assert found == pytest.approx(scale, rel=1e-12)
            else:
                assert found is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"a.q": 1.5, "a.k": 1.5, "b.q": 1.5}),
        ({"use_rslora": True}, {"a.q": 3.0, "a.k": 3.0, "b.q": 3.0}),
        ({"alpha_pattern": {"q": 8}}, {"a.q": 2.0, "a.k": 1.5, "b.q": 2.0}),
        ({"alpha_pattern": {"^a.q": 2, "q": 8}}, {"a.q": 0.5, "a.k": 1.5, "b.q": 2.0}),
        ({"alpha_pattern": {"^a\\.q$": 2}}, {"a.q": 0.5, "a.k": 1.5, "b.q": 1.5}),
        ({"alpha_pattern": {"[ab]\\.(q|k)": 2, "q": 8}}, {"a.q": 0.5, "a.k": 0.5, "b.q": 0.5}),
        ({"lora_alpha": None}, {"a.q": None, "a.k": None, "b.q": None}),
    ],
    ids=["alpha", "root", "name", "anchored", "escaped", "expression", "unstated"],
)
def test_peft_divides_alpha_by_the_rank_or_its_root(
    tmp_path: Path, settings: dict[str, Any], expected: dict[str, float | None]
) -> None:
    uri = peft(tmp_path / "adapter", {"a.q": 4, "a.k": 4, "b.q": 4}, **settings)
    adapter = open_adapter(uri).adapter
    assert said(adapter, AdapterSource(uri, "peft")) == {f"{name}.weight": scale for name, scale in expected.items()}
    assert all(update.scale == expected[name[:3]] for name, (update,) in adapter.updates.items())


def test_the_rank_of_a_pattern_divides_alpha(tmp_path: Path) -> None:
    uri = peft(tmp_path / "adapter", {"a.q": 2, "a.k": 4}, rank_pattern={"q": 2})
    assert said(open_adapter(uri).adapter, AdapterSource(uri, "peft")) == {"a.q.weight": 3.0, "a.k.weight": 1.5}


def test_what_the_caller_assumes_fills_what_is_not_stated(tmp_path: Path) -> None:
    uri = peft(tmp_path / "adapter", {"a.q": 4}, lora_alpha=None)
    adapter = open_adapter(uri).adapter
    assert said(adapter, AdapterSource(uri, "peft", alpha=2.0)) == {"a.q.weight": 0.5}
    assert said(adapter, AdapterSource(uri, "peft", scale=0.25)) == {"a.q.weight": 0.25}


def test_what_the_files_state_is_not_assumed_away(tmp_path: Path) -> None:
    uri = peft(tmp_path / "adapter", {"a.q": 4})
    assert said(open_adapter(uri).adapter, AdapterSource(uri, "peft", alpha=99.0)) == {"a.q.weight": 1.5}


def test_too_many_expressions_are_not_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "_MOST_STEPS", 2000)
    modules = {f"a.{n}": 4 for n in range(100)}
    uri = peft(tmp_path / "adapter", modules, alpha_pattern={f"[x{n}]y+": 2 for n in range(100)})
    found = said(open_adapter(uri).adapter, AdapterSource(uri, "peft"))
    assert set(found.values()) == {None}


def test_kinds_without_a_factor_and_formats_without_a_formula_have_no_scale(tmp_path: Path) -> None:
    uri = peft(tmp_path / "adapter", {"a.q": 4})
    (update,) = open_adapter(uri).adapter.updates["a.q.weight"]
    adapter = open_adapter(uri).adapter
    assert isinstance(update, LowRank)
    assert Scales(adapter, AdapterSource(uri, "none")).of("a.q.weight", update) is None
    assert Scales(adapter, AdapterSource(uri, "peft")).of("a.q.weight", Scaled(None)) is None


def test_a_merge_is_compared_with_the_formula_of_each_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fixture that can be merged is, and no factor is left without a formula."""
    seen: list[Checked] = []
    real = verify.check_output

    def noted(*given: Any, **named: Any) -> Checked:
        seen.append(real(*given, **named))
        return seen[-1]

    monkeypatch.setattr(verify, "check_output", noted)
    merged = set()
    for number, case in enumerate(CASES):
        adapter = open_adapter(str(GOOD / case)).adapter
        if adapter.config.pipeline is not None:  # of several components: tests/jobs/test_merge_pipeline.py
            if len(adapter.config.pipeline.components) > 1:
                continue
            adapter = adapter.only(adapter.config.pipeline.components[0])
        shapes = {weight: chain[0].shape for weight, chain in adapter.updates.items()}
        scaled = [update for chain in adapter.updates.values() for update in chain if scale_used(update)[0]]
        if any(update.scale is None for update in scaled) or any(0 in shape for shape in shapes.values()):
            continue
        base = save_base(tmp_path / f"base{number}", {n: torch.randn(*shape) for n, shape in shapes.items()}, {})
        merge(str(base), [str(GOOD / case)], str(tmp_path / f"out{number}"), verify="full")
        merged.add(case.partition("/")[0])
    assert {"peft", "native", "mlx"} <= merged
    assert all(one.unscaled == 0 and one.changed == one.followed == one.compared for one in seen)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.sampled_from(["", "x", "1e3", "^a[", "q"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["q", "^a.q$", "[a", "a|q"]), inner),
    max_leaves=4,
)
KEYS = [
    *("peft_type", "r", "lora_alpha", "alpha", "rank", "rank_pattern", "alpha_pattern", "use_rslora", "hybrid_r"),
    *("alpha_exceptions", "rank_exceptions", "scaling", "difference_scale", "lora_parameters", "lora_r", "init_r"),
]
TYPES = [
    "LORA",
    "LOHA",
    "ADALORA",
    "C3A",
    "DEFT",
    "FOURIERFT",
    "GRALORA",
    "PEANUT",
    "RANDLORA",
    "SUPERTUNING",
    "WAVEFT",
]


@given(
    raw=st.dictionaries(st.sampled_from(KEYS), JUNK),
    kind=st.none() | st.sampled_from(TYPES),
    name=st.sampled_from(["peft", "native", "mlx", "litgpt"]),
    weight=st.sampled_from(["a.q.weight", "a.in_proj_weight", "q", ""]),
)
def test_no_config_makes_a_formula_fail(raw: dict[str, Any], kind: Any, name: str, weight: str) -> None:
    config = AdapterConfig(raw={**raw, **({} if kind is None else {"peft_type": kind})})
    formulas = Scales(Adapter(config=config, updates={}), AdapterSource("memory", name))
    for update in (low_rank(8, 6), Dense(LazyTensor.of(torch.ones(8, 6)))):
        found = formulas.of(weight, update)
        assert found is None or isinstance(found, float)


PAIR, TABLE = low_rank(8, 6, rank=4), Dense(LazyTensor.of(torch.ones(8, 6)))


@pytest.mark.parametrize(
    ("form", "raw", "weight", "update", "expected"),
    [
        ("native", {"alpha": 4, "rank": 2}, "a.q.weight", PAIR, 2.0),
        ("native", {"alpha": 4, "rank": 4, "scaling": "alpha/sqrt(rank)"}, "a.q.weight", PAIR, 2.0),
        ("native", {"alpha": 4, "rank": 2, "alpha_exceptions": {"a.q": 6}}, "a.q.weight", PAIR, 3.0),
        ("native", {"alpha": 4, "rank": 2, "alpha_exceptions": {"a.q": 6}}, "a.k.weight", PAIR, 2.0),
        ("native", {"alpha": 4, "rank": 2, "rank_exceptions": {"a.q": 8}}, "a.q.weight", PAIR, 0.5),
        ("native", {"alpha": 4, "rank": 0}, "a.q.weight", PAIR, None),
        ("native", {"alpha": 4, "rank": -2}, "a.q.weight", PAIR, None),
        ("native", {"difference_scale": {"a.q.weight": 3}}, "a.q.weight", TABLE, 3.0),
        ("native", {"difference_scale": {"a.q.weight": 3}}, "a.k.weight", TABLE, 1.0),
        ("mlx", {}, "a.q.weight", PAIR, 20.0),
        ("mlx", {"lora_parameters": {"scale": 5, "alpha": 7}}, "a.q.weight", PAIR, 5.0),
        ("mlx", {"alpha": 7, "scale": 5}, "a.q.weight", PAIR, 7.0),
        ("mlx", {"rank": 4}, "a.q.weight", PAIR, None),
        ("litgpt", {"lora_r": 4, "lora_alpha": 6}, "a.q.weight", PAIR, 1.5),
        ("peft", {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 6}, "a.q.weight", PAIR, 6 / 4.00001),
        ("peft", {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 0}, "a.q.weight", PAIR, 4 / 4.00001),
        ("peft", {"peft_type": "ADALORA"}, "a.q.weight", PAIR, 8 / 12.00001),
        ("peft", {"peft_type": "C3A"}, "a.q.weight", TABLE, 1 / 6),
        ("peft", {"peft_type": "C3A"}, "a.q.weight", PAIR, 1.0),
        ("peft", {"peft_type": "FOURIERFT"}, "a.q.weight", TABLE, 150 / 48),
        ("peft", {"peft_type": "FOURIERFT", "scaling": 12}, "a.q.weight", TABLE, 0.25),
        ("peft", {"peft_type": "GRALORA"}, "a.q.weight", PAIR, 2.0),
        ("peft", {"peft_type": "GRALORA", "alpha": 6, "r": 2, "hybrid_r": 1}, "a.q.weight", PAIR, 2.0),
        ("peft", {"peft_type": "GRALORA", "r": 0}, "a.q.weight", PAIR, None),
        ("peft", {"peft_type": "PEANUT"}, "a.q.weight", PAIR, 1.0),
        ("peft", {"peft_type": "RANDLORA"}, "a.q.weight", PAIR, 20.0),
        ("peft", {"peft_type": "SUPERTUNING", "lora_alpha": 6, "r": 4}, "a.q.weight", PAIR, 1.5),
        ("peft", {"peft_type": "SUPERTUNING", "lora_alpha": 6, "r": 4}, "a.q.weight", TABLE, 1.0),
        ("peft", {"peft_type": "WAVEFT"}, "a.q.weight", TABLE, 25.0),
        ("peft", {"peft_type": "DEFT", "alpha": 6}, "a.q.weight", PAIR, 1.5),
        ("peft", {"peft_type": "DEFT"}, "a.q.weight", PAIR, 1.0),
    ],
)
def test_each_formula_by_hand(
    form: str, raw: dict[str, Any], weight: str, update: LowRank | Dense, expected: float | None
) -> None:
    formulas = Scales(Adapter(config=AdapterConfig(raw=raw), updates={}), AdapterSource("memory", form))
    assert formulas.of(weight, update) == (expected if expected is None else pytest.approx(expected, rel=1e-12))


def test_the_output_of_attention_is_added_twice_and_its_module_is_called_by_its_path() -> None:
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "alpha_pattern": {"m": 12, "e.gate_up": 2}}
    names = ("m.in_proj_weight", "m.out_proj.weight", "m.out_proj.bias", "x.out_proj.weight", "e.gate_up", "m.q.weight")
    change = Adapter(config=AdapterConfig(raw=raw), updates=dict.fromkeys(names, (PAIR,)))
    expected = dict(zip(names, (3.0, 3.0, 1.5, 1.5, 0.5, 1.5), strict=True))
    assert said(change, AdapterSource("memory", "peft")) == expected


@pytest.mark.parametrize(("raw", "expected"), [({"rank": 4}, 0.25), ({"alpha": 7}, 0.25), ({}, 0.25)])
def test_the_caller_decides_what_an_old_file_of_mlx_means(raw: dict[str, Any], expected: float) -> None:
    formulas = Scales(Adapter(config=AdapterConfig(raw=raw), updates={}), AdapterSource("memory", "mlx", scale=0.25))
    assert formulas.of("a.q.weight", PAIR) == expected
