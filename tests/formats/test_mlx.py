"""MLX: its three forms, its scale, embeddings and experts; tests/upstream asks MLX-LM itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bundles import bundle, loaded, tensors
from oracle import dense
from strategies import lazy, values
from torch import Tensor

from loraformat.errors import AssumptionContradicted, ConfigError, FormatError, MissingFile, UnsupportedUpdate
from loraformat.formats import mlx
from loraformat.formats.kit.base import NO_HINTS, Hints
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.updates import LowRank

A, B = values(5, 2, seed=1), values(2, 7, seed=2)
PAIR = {"q.lora_a": A, "q.lora_b": B}
CONFIG: dict[str, Any] = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}


def read(entries: dict[str, Tensor], config: Any = CONFIG, hints: Hints = NO_HINTS) -> Adapter:
    files: dict[str, Any] = {"adapters.safetensors": entries}
    if config is not None:
        files["adapter_config.json"] = config
    return mlx.read(bundle(files), hints=hints)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_scale_is_the_factor_itself() -> None:
    adapter = read(PAIR)
    close(dense(adapter.updates["q.weight"][0]), 20 * (A.double() @ B.double()).T)
    assert adapter.config.declared_ranks == {"q.weight": 2}


def test_alpha_in_its_place_is_refused_as_mlx_does() -> None:
    with pytest.raises(ConfigError, match=r"expected scale.*found alpha"):
        read(PAIR, {"lora_parameters": {"rank": 2, "alpha": 16, "dropout": 0}})


def test_a_config_without_lora_parameters_needs_the_scale_from_the_caller() -> None:
    config = {"model": "somebody/model", "num_layers": 4}
    with pytest.raises(ConfigError) as caught:
        read(PAIR, config)
    assert caught.value.hint == "pass the scale itself with --assume scale=S"
    adapter = read(PAIR, config, Hints(scale=20))
    close(dense(adapter.updates["q.weight"][0]), 20 * (A.double() @ B.double()).T)
    assert adapter.config.base_model == "somebody/model"
    assert read(PAIR, config, Hints(alpha=8, rank=2)).updates["q.weight"][0].scale == 4


def test_old_mlx_vlm_multiplied_by_alpha_as_it_is() -> None:
    adapter = read({"q.A": A, "q.B": B}, {"rank": 2, "alpha": 0.1, "dropout": 0})
    close(dense(adapter.updates["q.weight"][0]), 0.1 * (A.double() @ B.double()).T)


def test_the_two_factors_that_an_old_mlx_vlm_file_may_mean_are_both_named() -> None:
    """By Blaizzy/mlx-vlm#845 alpha is divided by the rank; the file does not say before or after."""
    config = {"rank": 2, "alpha": 16, "dropout": 0}
    (note,) = read({"q.A": A, "q.B": B}, config).notes
    assert (note.code, "16 was assumed, others use 8" in note.message) == ("LF244", True)
    files = {"adapters.safetensors": tensors({"q.A": A, "q.B": B}), "adapter_config.json": config}
    for scale in (8, 16):
        said = mlx.read(bundle(files), hints=Hints(scale=scale))
        assert (said.updates["q.weight"][0].scale, said.notes) == (scale, ())


def test_arrays_of_mlx_examples_have_the_constant_of_their_code() -> None:
    files = {"adapters.npz": tensors(PAIR, "npz")}
    adapter = mlx.read(bundle(files))
    assert adapter.updates["q.weight"][0].scale == 20
    assert [note.code for note in adapter.notes] == ["LF241"]
    said = mlx.read(bundle(files), hints=Hints(scale=10))
    assert (said.updates["q.weight"][0].scale, said.notes) == (10, ())
    assert mlx.read(bundle(files), hints=Hints(alpha=10, rank=2)).updates["q.weight"][0].scale == 5


def test_a_hint_never_contradicts() -> None:
    with pytest.raises(AssumptionContradicted, match="scale of 20"):
        read(PAIR, hints=Hints(scale=10))
    with pytest.raises(MissingFile, match=r"adapter_config\.json"):
        read(PAIR, None)


def test_embeddings_are_told_by_the_base_or_their_name() -> None:
    table = {"model.embed_tokens.lora_a": A, "model.embed_tokens.lora_b": B}
    close(dense(read(table).updates["model.embed_tokens.weight"][0]), 20 * A.double() @ B.double())
    other = {"model.emb.lora_a": A, "model.emb.lora_b": B}
    assert not read(other).updates["model.emb.weight"][0].is_embedding
    known = read(other, hints=Hints(weights={"model.emb.weight": (5, 7)}))
    assert known.updates["model.emb.weight"][0].is_embedding


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["gate_proj", "w1"])
def test_stacked_experts_have_the_names_of_the_base(name: str, *, flat: bool) -> None:
    a, b = values(3, 2, 5, seed=1), values(3, 7, 2, seed=2)
    stack = "model.layers.0.mlp.switch_mlp.gate_proj"
    entries = {f"{stack}.lora_a": a.reshape(6, 5) if flat else a, f"{stack}.lora_b": b}
    with pytest.raises(UnsupportedUpdate, match=r"3 experts.*--base"):
        read(entries)
    weights = {f"model.layers.0.mlp.experts.{number}.{name}.weight": (7, 5) for number in range(3)}
    adapter = read(entries, hints=Hints(weights=weights))
    assert list(adapter.updates) == list(weights)
    for number, weight in enumerate(weights):
        close(dense(adapter.updates[weight][0]), 20 * b[number].double() @ a[number].double())


def test_what_is_half_or_unknown_is_kept_and_told() -> None:
    adapter = read({**PAIR, "k.lora_a": A, "odd": A})
    assert [note.code for note in adapter.notes] == ["LF201"]
    assert sorted(adapter.unclaimed) == ["k.a", "odd"]
    with pytest.raises(FormatError, match="twice"):
        read({**PAIR, "q.A": A})


def test_whole_weights_are_no_adapter() -> None:
    with pytest.raises(UnsupportedUpdate, match="the weights of the whole model"):
        read(PAIR, {"fine_tune_type": "full", "lora_parameters": {}})


def test_dora_without_magnitudes_is_told() -> None:
    adapter = read(PAIR, {**CONFIG, "fine_tune_type": "dora"})
    assert [note.code for note in adapter.notes] == ["LF225"]


def test_keys_are_exactly_the_adapted_modules() -> None:
    updates = {f"net.{name}.weight": (LowRank(lazy(5, 2), lazy(2, 3), 1.5),) for name in ("a", "b")}
    config = AdapterConfig(base_model="example/tiny", raw={"peft_type": "LORA", "lora_dropout": 0.1})
    written = loaded(mlx.write(Adapter(config=config, updates=updates)))
    assert written["adapter_config.json"] == {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.1, "keys": ["net.a", "net.b"], "rank": 2, "scale": 1.5},
        "model": "example/tiny",
        "num_layers": -1,
    }
    assert {name: tuple(value.shape) for name, value in written["adapters.safetensors"].items()} == {
        **{f"net.{name}.lora_a": (3, 2) for name in "ab"},
        **{f"net.{name}.lora_b": (2, 5) for name in "ab"},
    }
