"""init: PEFT loads it, its first answers are the base's, and its numbers are drawn as PEFT draws them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from model_pairs import Tensors, llama, logits, model_of, read, write
from safetensors.torch import load_file

import loraformat
from loraformat.cli import main
from loraformat.errors import LoraFormatError, ShapeMismatch, UnsupportedUpdate, UsageError

INITS = ["kaiming", "gaussian", "orthogonal", "pissa", "olora"]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return llama()


def loaded(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model_of(base), str(adapter), is_trainable=True).eval()


@pytest.mark.parametrize("kind", INITS)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_the_first_answers_are_those_of_the_base(
    tmp_path: Path, tensors: Tensors, kind: str, alpha: float | None
) -> None:
    base = write(tmp_path / "base", tensors)
    loraformat.init(base, tmp_path / "out", rank=4, alpha=alpha, target=["q_proj", "down_proj"], init=kind)
    model, wanted = loaded(base, tmp_path / "out"), logits(model_of(base))
    found = logits(model)
    assert (found - wanted).norm() <= (0 if kind in ("kaiming", "gaussian") else 1e-5) * wanted.norm()
    factors = {name for name, value in model.named_parameters() if value.requires_grad}
    assert len(factors) == 8
    # The factors are ours, not those that PEFT drew while it loaded.
    ours = read(tmp_path / "out")
    for name, value in model.state_dict().items():
        if "lora_" in name:
            assert torch.equal(value, ours[name.replace(".default", "")]), name
    if kind in ("pissa", "olora"):
        assert any(float(value.abs().max()) > 0.01 for name, value in ours.items() if "lora_B" in name)


@pytest.mark.parametrize("kind", INITS)
def test_merging_it_gives_the_base(tmp_path: Path, tensors: Tensors, kind: str) -> None:
    base = write(tmp_path / "base", tensors)
    loraformat.init(base, tmp_path / "out", rank=4, target=["all-linear"], init=kind)
    loraformat.merge(base, [tmp_path / "out"], tmp_path / "merged")
    for name, value in read(tmp_path / "merged").items():
        assert torch.allclose(value, tensors[name], atol=1e-6), name


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_the_part_of_the_weight_is_pefts(tmp_path: Path, tensors: Tensors, kind: str) -> None:
    import peft

    base = write(tmp_path / "base", tensors)
    loraformat.init(base, tmp_path / "out", rank=4, alpha=2, target=["q_proj"], init=kind)
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=kind)
    theirs = peft.get_peft_model(model_of(base), config).state_dict()
    ours = read(tmp_path / "out")
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        products = [
            part[f"{stem}.lora_B{end}"].double() @ part[f"{stem}.lora_A{end}"].double()
            for part, end in ((ours, ".weight"), (theirs, ".default.weight"))
        ]
        assert torch.allclose(*products, atol=1e-5)
        sizes = [part[f"{stem}.lora_A{end}"].norm() for part, end in ((ours, ".weight"), (theirs, ".default.weight"))]
        assert torch.allclose(*sizes, rtol=1e-4), "split between the factors as PEFT does"


def wide(tmp_path: Path) -> Path:
    return write(
        tmp_path / "base", {"layers.0.up.weight": torch.randn(900, 400), "layers.1.up.weight": torch.ones(900, 400)}
    )


def test_the_numbers_are_drawn_as_peft_draws_them(tmp_path: Path) -> None:
    base = wide(tmp_path)
    found = {}
    for kind in INITS[:3]:
        loraformat.init(base, tmp_path / kind, rank=64, target=["up"], init=kind)
        found[kind] = read(tmp_path / kind)
    stem = "base_model.model.layers.0.up"
    kaiming, gaussian = (found[kind][f"{stem}.lora_A.weight"].double() for kind in INITS[:2])
    bound = 400**-0.5
    assert float(kaiming.abs().max()) <= bound
    assert float(kaiming.abs().max()) > 0.999 * bound
    assert float(kaiming.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert float(gaussian.std()) == pytest.approx(1 / 64, rel=0.02)
    assert abs(float(gaussian.mean())) < 1e-3
    for kind in INITS[:2]:
        assert not found[kind][f"{stem}.lora_B.weight"].any()
    a, b = (found["orthogonal"][f"{stem}.lora_{side}.weight"].double() for side in "AB")
    assert float((b @ a).abs().max()) < 1e-6
    assert float(a.std()) == pytest.approx(0.1 * 0.5**0.5, rel=0.05)
    assert torch.linalg.matrix_rank(a, rtol=1e-5) == torch.linalg.matrix_rank(b, rtol=1e-5) == 32
    one, other = (found["kaiming"][f"base_model.model.layers.{at}.up.lora_A.weight"] for at in range(2))
    assert abs(float(np.corrcoef(one.flatten(), other.flatten())[0, 1])) < 0.05, "each module its own"


@pytest.mark.parametrize("kind", INITS[:3])
def test_seeds_decide_and_threads_do_not(tmp_path: Path, kind: str) -> None:
    base = wide(tmp_path)
    written = {}
    for seed, jobs in ((0, 1), (0, 4), (7, 1)):
        out = tmp_path / f"out-{seed}-{jobs}"
        loraformat.init(base, out, rank=8, target=["up"], init=kind, seed=seed, jobs=jobs)
        written[seed, jobs] = (out / WEIGHTS).read_bytes()
    assert written[0, 1] == written[0, 4]
    assert written[0, 1] != written[7, 1]


def test_targets_and_config(tmp_path: Path, tensors: Tensors) -> None:
    base = write(tmp_path / "base", tensors)
    loraformat.init(base, tmp_path / "a", rank=4, alpha=8, target=["q_proj", "v_proj"])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["r"], config["lora_alpha"]) == (["q_proj", "v_proj"], 4, 8)
    assert (config["init_lora_weights"], config["task_type"]) == (True, "CAUSAL_LM")
    loraformat.init(base, tmp_path / "b", rank=4, target=["layers=1", "embed_tokens"])
    assert {name.split(".")[2] for name in loraformat.load_adapter(tmp_path / "b").updates} == {"1", "weight"}
    assert (logits(loaded(base, tmp_path / "b")) - logits(model_of(base))).norm() == 0
    report = loraformat.init(base, tmp_path / "c", rank=4, target=["all-linear"])
    assert len(report.data.weights) == 14


def saved_by(model: Any, folder: Path) -> Path:
    """A small random model as transformers saves it."""
    model.save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=32)
    return saved_by(transformers.GPT2LMHeadModel(config), folder)


def bert(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=96, max_position_embeddings=32, **sizes)
    return saved_by(transformers.BertForMaskedLM(config), folder)


def mamba(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=1, vocab_size=96)
    return saved_by(transformers.MambaForCausalLM(config), folder)


@pytest.mark.parametrize(
    ("make", "tables"),
    [(gpt2, ["wte", "wpe"]), (bert, ["position_embeddings", "token_type_embeddings"]), (mamba, ["embeddings"])],
)
def test_tables_are_written_as_peft_reads_tables(tmp_path: Path, make: Any, tables: list[str]) -> None:
    """PEFT wraps an `nn.Embedding` in lora_embedding_A and _B, and drops other factors with a warning."""
    base = make(tmp_path / "base")
    loraformat.init(base, tmp_path / "out", rank=4, target=tables)
    kind = transformers.AutoModelForMaskedLM if make is bert else transformers.AutoModelForCausalLM
    model = peft.get_peft_model(
        kind.from_pretrained(base), peft.LoraConfig(r=4, target_modules=tables, init_lora_weights=False)
    )
    wanted = {name: value.shape for name, value in peft.get_peft_model_state_dict(model).items() if "lora_" in name}
    assert {name: value.shape for name, value in load_file(tmp_path / "out" / WEIGHTS).items()} == wanted
    loraformat.init(base, tmp_path / "linear", rank=4, target=["all-linear"])
    assert not any(f".{table}." in name for table in tables for name in load_file(tmp_path / "linear" / WEIGHTS))


def refused(base: Path, out: Path, **options: Any) -> LoraFormatError:
    with pytest.raises(LoraFormatError) as found:
        loraformat.init(base, out, **{"rank": 4, "target": ["q_proj"], **options})
    assert not out.exists()
    return found.value


def test_what_cannot_be_drawn_is_one_error(tmp_path: Path, tensors: Tensors) -> None:
    base, out = write(tmp_path / "base", tensors), tmp_path / "out"
    assert isinstance(refused(base, out, target=[]), UsageError)
    assert "q_proj" in refused(base, out, target=["q_prj"]).hint
    assert "even" in refused(base, out, rank=3, init="orthogonal").message
    assert isinstance(refused(base, out, rank=0), UsageError)
    assert isinstance(refused(base, out, rank=33, init="pissa"), ShapeMismatch)
    assert "above 0" in refused(base, out, alpha=-1.0, init="olora").message
    assert "only PEFT" in refused(base, out, init="pissa", to="mlx").message
    assert isinstance(refused(base, out, init="olora", target=["embed_tokens"]), UnsupportedUpdate)
    name = "model.layers.0.self_attn.q_proj.weight"
    flat = write(tmp_path / "flat", {**tensors, name: torch.eye(32)})
    assert "are equal" in refused(flat, out, init="pissa").message
    broken = write(tmp_path / "nan", {**tensors, name: torch.full((32, 32), float("nan"))})
    assert name in str(refused(broken, out, init="olora"))
    assert isinstance(refused(Path("fixtures/quantized/nf4"), out, init="pissa"), UnsupportedUpdate)


def test_a_convolution_of_each_channel_for_itself_is_no_target(tmp_path: Path) -> None:
    """PEFT refuses an adapter of it."""
    base, out = mamba(tmp_path / "base"), tmp_path / "out"
    found = refused(base, out, target=["conv1d"])
    assert isinstance(found, UnsupportedUpdate)
    assert "backbone.layers.0.mixer.conv1d.weight" in found.message
    loraformat.init(base, out, rank=4, target=["backbone.layers.*"])
    assert {name.split(".")[-2] for name in loraformat.load_adapter(out).updates} == {"in_proj", "x_proj", "dt_proj"}
    assert isinstance(refused(base, tmp_path / "none", target=["out_proj"]), UnsupportedUpdate)
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), str(out))
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_the_target_is_what_is_wrong(tmp_path: Path, tensors: Tensors) -> None:
    base, out = write(tmp_path / "base", tensors), tmp_path / "out"
    assert refused(base, out, target=["nope"]).where == "--target"
    found = refused(gpt2(tmp_path / "tied"), out, target=["lm_head"])
    assert (found.where, found.code) == ("--target", "LF021")
    assert "lm_head.weight is tied to transformer.wte.weight" in found.message
    assert "--target wte" in found.hint
    for alpha in (-1.0, 0.0, float("nan"), float("inf")):
        found = refused(base, out, alpha=alpha)
        assert (found.where, found.code) == ("--alpha", "LF021"), alpha


def test_other_formats_take_it(tmp_path: Path, tensors: Tensors) -> None:
    base = write(tmp_path / "base", tensors)
    for form in ("native", "mlx"):
        loraformat.init(base, tmp_path / form, rank=4, alpha=8, target=["q_proj"], to=form)
        adapter = loraformat.load_adapter(tmp_path / form)
        assert not any(adapter.delta(name).any() for name in adapter.updates)
        assert {update.scale for chain in adapter.updates.values() for update in chain} == {2.0}


def test_the_command(tmp_path: Path, tensors: Tensors) -> None:
    base = write(tmp_path / "base", tensors)
    arguments = [
        "init",
        str(base),
        "--rank",
        "4",
        "--target",
        "q_proj",
        "-o",
        str(tmp_path / "out"),
        "--format",
        "json",
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["data"]["method"] == "kaiming, rank 4, alpha 4, seed 0"
