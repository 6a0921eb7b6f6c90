"""Dumps: spellings, orientation, alpha beside the tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bundles import bundle, tensors
from oracle import dense
from strategies import values
from torch import Tensor

from loraformat.errors import ConfigError, MissingFile, UnsupportedUpdate
from loraformat.formats import dump
from loraformat.formats.kit.base import Hints
from loraformat.model.adapter import Adapter
from loraformat.model.updates import LowRank, Replace

A, B = values(2, 5, seed=1), values(7, 2, seed=2)
SPELLINGS = [
    ("lora_A", "lora_B"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_a", "lora_b"),
    ("lora.lora_A", "lora.lora_B"),
    ("lora.A", "lora.B"),
    ("lora_down", "lora_up"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("parametrizations.weight.0.lora_A", "parametrizations.weight.0.lora_B"),
]


def one_file(entries: dict[str, Tensor], **extras: Any) -> Any:
    return bundle({"dump.pt": tensors(entries, "torch", **extras)}, single=True)


def read(entries: dict[str, Tensor], hints: Hints = Hints(alpha=4), **extras: Any) -> Adapter:
    return dump.read(one_file(entries, **extras), hints=hints)


def delta(adapter: Adapter, weight: str = "net.q.weight") -> Tensor:
    (update,) = adapter.updates[weight]
    assert isinstance(update, LowRank)
    return update.scale * update.up.torch() @ update.down.torch()


@pytest.mark.parametrize(("a", "b"), SPELLINGS)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_spelling_in_either_orientation(a: str, b: str, *, transposed: bool) -> None:
    entries = {f"net.q.{a}": A.T if transposed else A, f"net.q.{b}": B.T if transposed else B}
    adapter = read(entries)
    torch.testing.assert_close(delta(adapter), 2 * B @ A)
    assert dict(adapter.unclaimed) == {}


def test_a_square_layer_is_read_by_its_short_axis() -> None:
    a, b = values(8, 2), values(2, 8, seed=3)
    torch.testing.assert_close(delta(read({"net.q.lora_A": a, "net.q.lora_B": b})), 2 * (a @ b).T)


def test_two_square_factors_need_the_base_or_another_pair() -> None:
    a, b = values(3, 3), values(3, 3, seed=1)
    with pytest.raises(ConfigError, match=r"the shapes fit.*--base"):
        read({"net.q.lora_A": a, "net.q.lora_B": b})
    others = {"net.k.lora_A": values(9, 3), "net.k.lora_B": values(3, 8)}
    torch.testing.assert_close(delta(read({"net.q.lora_A": a, "net.q.lora_B": b, **others})), 4 / 3 * (a @ b).T)


def test_pairs_that_disagree_about_the_orientation_are_refused() -> None:
    with pytest.raises(ConfigError, match="stored in different ways"):
        read({"q.lora_A": A, "q.lora_B": B, "k.lora_A": A.T, "k.lora_B": B.T})


def test_factors_without_a_common_rank_are_refused() -> None:
    with pytest.raises(ConfigError, match="A and B have no common rank"):
        read({"q.lora_A": values(8, 64), "q.lora_B": values(128, 4)})


def test_the_base_decides_about_embeddings_and_convolutions() -> None:
    wte_a, wte_b = values(50, 4), values(4, 6)
    conv_a, conv_b = values(4, 27), values(8, 4)
    entries = {"wte.lora_A": wte_a, "wte.lora_B": wte_b, "conv.lora_A": conv_a, "conv.lora_B": conv_b}
    adapter = read(entries, Hints(scale=1.0, weights={"wte.weight": (50, 6), "conv.weight": (8, 3, 3, 3)}))
    torch.testing.assert_close(delta(adapter, "wte.weight"), wte_a @ wte_b)
    assert adapter.updates["wte.weight"][0].is_embedding
    (conv,) = adapter.updates["conv.weight"]
    assert isinstance(conv, LowRank)
    assert conv.shape == (8, 3, 3, 3)


def test_a_base_that_stores_weights_transposed_does_not_make_embeddings() -> None:
    hints = Hints(alpha=4, fan_in_fan_out=True, weights={"net.q.weight": (5, 7)})
    adapter = read({"net.q.lora_A": A, "net.q.lora_B": B}, hints)
    torch.testing.assert_close(delta(adapter), 2 * B @ A)
    assert adapter.config.fan_in_fan_out


def test_copies_of_the_weights_decide_and_are_left_out() -> None:
    a, b = values(3, 3), values(3, 7)
    adapter = read({"q.lora_A": a, "q.lora_B": b, "q.linear.weight": values(7, 3), "norm.weight": values(3)})
    torch.testing.assert_close(delta(adapter, "q.weight"), 4 / 3 * (a @ b).T)
    assert [note.code for note in adapter.notes] == ["LF203", "LF240"]
    assert not adapter.unclaimed


def test_other_weights_are_the_bases_only_in_the_file_of_a_whole_model() -> None:
    adapter = read({"q.lora_A": A, "q.lora_B": B, "norm.weight": values(3)})
    assert list(adapter.unclaimed) == ["norm.weight"]
    known = Hints(alpha=4, weights={"q.weight": (7, 5), "norm.weight": (3,)})
    adapter = read({"q.lora_A": A, "q.lora_B": B, "norm.weight": values(3)}, known)
    assert [type(update) for update in adapter.updates["norm.weight"]] == [Replace]
    assert not adapter.unclaimed


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "model.base_model.model."])
def test_prefixes_of_wrappers_are_no_part_of_a_name(prefix: str) -> None:
    adapter = read({f"{prefix}net.q.lora_A": A, f"{prefix}net.q.lora_B": B})
    torch.testing.assert_close(delta(adapter), 2 * B @ A)
    assert [note.code for note in adapter.notes] == ["LF221"]


@pytest.mark.parametrize("extras", [{"config": {"r": 2, "alpha": 6}}, {"args": {"lora_alpha": 6}}, {"alpha": 6}])
def test_alpha_beside_the_tensors(extras: dict[str, Any]) -> None:
    adapter = read({"q.lora_A": A, "q.lora_B": B}, Hints(), **extras)
    assert adapter.updates["q.weight"][0].scale == 3


def test_alpha_in_metadata_is_text() -> None:
    file = tensors({"q.lora_A": A, "q.lora_B": B})
    named = type(file)("safetensors", file.entries, {"format": "pt", "lora_alpha": "6"})
    adapter = dump.read(bundle({"x.safetensors": named}, single=True))
    assert adapter.updates["q.weight"][0].scale == 3


def test_an_optimizers_alpha_is_none_of_ours() -> None:
    adapter = read({"q.lora_A": A, "q.lora_B": B}, Hints(), optimizer={"alpha": 0.99}, epoch=3)
    assert adapter.updates["q.weight"][0].scale is None


def test_two_alphas_are_refused() -> None:
    with pytest.raises(ConfigError, match="several values of alpha"):
        read({"q.lora_A": A, "q.lora_B": B}, Hints(), config={"alpha": 6}, args={"lora_alpha": 8})


def test_a_stated_rank_that_the_tensors_lack_is_left_to_the_rules() -> None:
    adapter = read({"q.lora_A": A, "q.lora_B": B}, config={"r": 4})
    assert adapter.config.declared_ranks == {"q.weight": 4}


def test_half_a_pair_is_noted_and_kept() -> None:
    adapter = read({"q.lora_A": A, "q.lora_B": B, "k.lora_A": A})
    assert [note.code for note in adapter.notes] == ["LF201"]
    assert list(adapter.unclaimed) == ["k.lora_A"]


def test_embedding_spelling() -> None:
    adapter = read({"e.lora_embedding_A": values(2, 9), "e.lora_embedding_B": values(4, 2)})
    (update,) = adapter.updates["e.weight"]
    assert isinstance(update, LowRank)
    assert (update.shape, update.is_embedding) == ((9, 4), True)


def test_sniffing_needs_pairs_in_one_tensor_file() -> None:
    match = dump.sniff(one_file({"q.lora_A.weight": A, "q.lora_B.weight": B}))
    assert match is not None
    assert not match.certain
    assert dump.sniff(one_file({"q.lora_A": A, "q.lora_B": B})) is None
    assert dump.sniff(one_file({"q.weight": A})) is None
    assert dump.sniff(bundle({"a.pt": {"q.lora_A": A}, "b.pt": {"q.lora_B": B}})) is None
    with pytest.raises(MissingFile):
        dump.read(bundle({"notes.txt": b""}))


def test_there_is_no_writer() -> None:
    adapter = read({"q.lora_A": A, "q.lora_B": B})
    assert [found.code for found in dump.losses(adapter)] == ["LF702"]
    with pytest.raises(UnsupportedUpdate):
        dump.write(adapter)


def test_conv1d_layers_of_gpt_2_are_not_taken_for_embeddings() -> None:
    """The base stores (in, out); A (in, rank), B (rank, out) are those of the layer."""
    a, b = values(16, 4, seed=1), values(4, 48, seed=2)
    entries = {"h.0.attn.c_attn.lora_A": a, "h.0.attn.c_attn.lora_B": b}
    hints = Hints(alpha=8, weights={"h.0.attn.c_attn.weight": (16, 48)}, config={"model_type": "gpt2"})
    (update,) = read(entries, hints).updates["h.0.attn.c_attn.weight"]
    assert not update.is_embedding
    torch.testing.assert_close(dense(update), 2 * (a.double() @ b.double()).T)


def test_a_linear_layer_with_exchanged_factors_is_no_embedding() -> None:
    a, b = values(8, 4, seed=1), values(4, 16, seed=2)
    hints = Hints(alpha=8, weights={"m.k_proj.weight": (8, 16)}, config={"model_type": "llama"})
    (update,) = read({"m.k_proj.lora_A": a, "m.k_proj.lora_B": b}, hints).updates["m.k_proj.weight"]
    assert not update.is_embedding
    torch.testing.assert_close(dense(update), 2 * a.double() @ b.double())


def test_a_square_layer_beside_exchanged_factors_is_not_guessed() -> None:
    entries = {"m.k_proj.lora_A": values(8, 4), "m.k_proj.lora_B": values(4, 16)}
    entries |= {"m.q_proj.lora_A": values(16, 4), "m.q_proj.lora_B": values(4, 16)}
    weights = {"m.k_proj.weight": (8, 16), "m.q_proj.weight": (16, 16)}
    with pytest.raises(ConfigError, match="A and B change roles"):
        read(entries, Hints(alpha=8, weights=weights, config={"model_type": "llama"}))
