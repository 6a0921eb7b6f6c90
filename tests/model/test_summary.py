"""Figures come from headers: a tensor whose values are asked for fails the test."""

from __future__ import annotations

from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.results.weight_figures import module_kind, weight_records
from loraformat.model.summary import layer_of, summarize
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import Hadamard, Kronecker, LowRank, Magnitude, Replace, Rows, Update


def tensor(*shape: int, dtype: DType = DType.F32) -> LazyTensor:
    def read(start: int, stop: int) -> object:
        raise AssertionError("a value was asked for")

    return LazyTensor(shape, dtype, read)  # type: ignore[arg-type]


def low_rank(rank: int, scale: float | None = 2.0, **more: object) -> LowRank:
    return LowRank(tensor(64, rank), tensor(rank, 32), scale, **more)  # type: ignore[arg-type]


def adapter(updates: dict[str, tuple[Update, ...]], **config: object) -> Adapter:
    return Adapter(config=AdapterConfig(**config), updates=updates)  # type: ignore[arg-type]


def test_everything_is_counted() -> None:
    found = summarize(
        adapter(
            {
                "embed_tokens.weight": (Rows((98, 99), tensor(2, 32, dtype=DType.BF16)),),
                "layers.2.q_proj.weight": (low_rank(4),),
                "layers.10.q_proj.weight": (low_rank(8, None), low_rank(4)),
                "layers.10.v_proj.weight": (low_rank(4, magnitude=Magnitude(tensor(64))),),
            },
            vocab_size=100,
            base_vocab_size=98,
        )
    )
    assert (found.weights, found.modules, found.layers) == (4, 4, (2, 10))
    assert found.module_kinds == {"embed_tokens": 1, "q_proj": 2, "v_proj": 1}
    assert found.update_kinds == {"dora": 1, "low-rank": 3, "rows": 1}
    assert list(found.ranks.items()) == [(4, 3), (8, 1)]
    assert list(found.scales.items()) == [(2.0, 3), (None, 1)]
    assert found.dtypes == {"BF16": 1, "F32": 9}
    assert found.parameters == 2 * 32 + 3 * (64 + 32) * 4 + (64 + 32) * 8 + 64
    assert found.nbytes == 2 * 32 * 2 + 4 * (found.parameters - 2 * 32)
    assert found.parameters_by_layer == {2: 384, 10: 768 + 384 + 384 + 64}
    assert (found.has_dora, found.has_rows, found.has_replacements, found.has_embeddings) == (True, True, False, True)
    assert found.new_rows == 2


def test_a_table_under_two_names_counts_once() -> None:
    table = tensor(10, 4)
    found = summarize(adapter({"lm_head.weight": (Replace(table),), "wte.weight": (Replace(table),)}))
    assert (found.tensors, found.parameters, found.weights) == (1, 40, 2)


def test_an_empty_adapter_has_a_summary() -> None:
    found = summarize(adapter({}))
    assert (found.weights, found.parameters, found.layers, found.new_rows) == (0, 0, (), None)


def test_layers_are_the_first_number_of_a_path() -> None:
    assert layer_of("model.layers.12.experts.3.up.weight") == 12
    assert layer_of("lm_head.weight") is None
    assert layer_of(f"layers.{'9' * 5000}.x") is None


def test_records_have_one_line_an_update() -> None:
    chain = (low_rank(4), Hadamard(tensor(8, 2), tensor(2, 8), tensor(8, 2), tensor(2, 8), 1.0))
    first, second = weight_records(adapter({"a.weight": chain}))
    assert (first.kind, first.rank, first.norm, first.parameters) == ("low-rank", 4, None, 384)
    assert (second.kind, second.shape, second.norm) == ("hadamard", (8, 8), None)


def test_damaged_factors_have_a_record_too() -> None:
    """The model holds what the file says; the rules judge it."""
    flat = Hadamard(tensor(), tensor(3), tensor(), tensor(3), 1.0)
    cross = Kronecker((tensor(3),), (tensor(), tensor(2)), 1.0)
    first, second = weight_records(adapter({"a.weight": (flat,), "b.weight": (cross,)}))
    assert (first.shape, second.shape) == ((0, 0), (0, 0))


def test_the_kind_of_a_module_is_its_last_name() -> None:
    kinds = {
        "model.layers.0.self_attn.q_proj.weight": "q_proj",
        "model.layers.0.self_attn.q_proj.bias": "q_proj.bias",
        "model.layers.3.mlp.experts.17.w1.weight": "w1",
        "model.layers.3.mlp.experts.gate_up_proj": "experts.gate_up_proj",
        "down_blocks.0.attentions.1.to_out.0.weight": "to_out",
        "weight": "weight",
    }
    assert {name: module_kind(name) for name in kinds} == kinds
