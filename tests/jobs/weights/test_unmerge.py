"""unmerge: exact where it says so, and every value that it does not know is one that a merge could not keep apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from model_pairs import Tensors, llama, model_of, read, write
from safetensors.torch import load_file, save_file

import loraformat
from loraformat.cli import main
from loraformat.errors import AdapterRefused, LoraFormatError, MergeError, UnsupportedUpdate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAME = "layers.0.up.weight"


def adapter(folder: Path, seed: int, size: float, rows: int = 40, cols: int = 24, **fields: Any) -> Path:
    """A PEFT folder with one update of rank 3."""
    g = torch.Generator().manual_seed(seed)
    folder.mkdir()
    module = NAME.removesuffix(".weight")
    factors = {
        f"base_model.model.{module}.lora_A.weight": torch.randn(3, cols, generator=g),
        f"base_model.model.{module}.lora_B.weight": torch.randn(rows, 3, generator=g) * size,
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["up"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def base_of(folder: Path, dtype: torch.dtype, *, narrow: bool = False, seed: int = 0) -> Path:
    """A base of one layer; with `narrow` all magnitudes stand between two powers of two, far from both."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(40, 24, generator=g)
    if narrow:
        value = (1.4 + 0.2 * torch.rand(40, 24, generator=g)) * value.sign()
    return write(folder, {NAME: value, "other": torch.ones(3)}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
def test_what_is_known_is_right_and_what_is_unknown_had_a_choice(
    tmp_path: Path, dtype: torch.dtype, size: float
) -> None:
    base, one = base_of(tmp_path / "base", dtype), adapter(tmp_path / "one", 1, size)
    loraformat.merge(base, [one], tmp_path / "merged")
    report = loraformat.unmerge(tmp_path / "merged", [one], tmp_path / "out")
    before, merged, found = (read(tmp_path / name)[NAME] for name in ("base", "merged", "out"))
    change = torch.from_numpy(loraformat.load_adapter(one).delta(NAME, dtype="float64"))
    # Brute force: every neighbour of the value that was found, 12 to either side, merged as torch rounds.
    step = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}[dtype]
    options = torch.zeros(found.shape, dtype=torch.int64)
    furthest = torch.zeros(found.shape, dtype=torch.float64)
    for away in range(-12, 13):
        near = (found.view(step) + away).view(dtype)
        gives = (near.double() + change).to(dtype) == merged
        options += gives
        distance = (near.double() - found.double()).abs()
        furthest = torch.where(gives & distance.isfinite(), torch.maximum(furthest, distance), furthest)
    (record,) = report.data.weights
    assert record.unlike == 0
    assert record.unknown == int((options > 1).sum())
    assert torch.equal(found[options == 1], before[options == 1]), "what is known is the base's"
    assert float((found.double() - before.double()).abs().max()) <= record.bound
    assert float(furthest.max()) <= record.bound or not record.unknown
    assert report.data.proof == "manifest"
    assert report.data.is_exact is (record.unknown == 0)
    assert torch.equal(read(tmp_path / "out")["other"], read(base)["other"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_proved_is_the_base(tmp_path: Path, dtype: torch.dtype, seed: int) -> None:
    base, one = base_of(tmp_path / "base", dtype, narrow=True, seed=seed), adapter(tmp_path / "one", seed, 1e-2)
    loraformat.merge(base, [f"{one}=0.5"], tmp_path / "merged")
    report = loraformat.unmerge(tmp_path / "merged", [f"{one}=0.5"], tmp_path / "out", strict=True)
    assert report.data.is_exact
    assert "the output has the base's tensors" in str(report)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_several_adapters_in_any_order(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", torch.bfloat16, narrow=True)
    one, two = adapter(tmp_path / "one", 1, 1e-2), adapter(tmp_path / "two", 2, 1e-2)
    loraformat.merge(base, [one, f"{two}=-0.5"], tmp_path / "merged")
    report = loraformat.unmerge(tmp_path / "merged", [f"{two}=-0.5", one], tmp_path / "out")
    assert report.data.is_exact
    assert torch.equal(read(tmp_path / "out")[NAME], read(base)[NAME])
    part = loraformat.unmerge(tmp_path / "merged", [one], tmp_path / "part")
    assert part.data.proof == "none", "the merge with the other alone was rounded nowhere"


def test_bytes_depend_on_neither_threads_nor_memory(tmp_path: Path) -> None:
    base, one = base_of(tmp_path / "base", torch.bfloat16), adapter(tmp_path / "one", 1, 1e-2)
    loraformat.merge(base, [one], tmp_path / "merged")
    reports = [
        loraformat.unmerge(tmp_path / "merged", [one], tmp_path / f"out{jobs}", jobs=jobs, memory_nbytes=memory)
        for jobs, memory in ((1, 64 << 20), (4, 1))
    ]
    assert reports[0].data.weights == reports[1].data.weights
    assert len({(tmp_path / f"out{jobs}" / "model.safetensors").read_bytes() for jobs in (1, 4)}) == 1


def test_nothing_is_proved_by_another_adapter_strength_or_model(tmp_path: Path) -> None:
    base, one = base_of(tmp_path / "base", torch.bfloat16, narrow=True), adapter(tmp_path / "one", 1, 1e-2)
    other, merged = adapter(tmp_path / "other", 2, 1e-2), tmp_path / "merged"
    loraformat.merge(base, [one], merged)

    def proof(adapter: object, out: str) -> str:
        return loraformat.unmerge(merged, [str(adapter)], tmp_path / out, dry_run=True).data.proof

    assert (proof(one, "a"), proof(other, "b"), proof(f"{one}=0.9", "c")) == ("manifest", "none", "none")
    file = merged / "model.safetensors"
    tensors = load_file(file)
    tensors[NAME][0, 0] += 1
    save_file(tensors, file)
    assert proof(one, "d") == "none", "the digest of the weight"
    (merged / "loraformat.manifest.json").unlink()
    assert proof(one, "e") == "none"
    with pytest.raises(AdapterRefused, match="nothing proves"):
        loraformat.unmerge(merged, [one], tmp_path / "f", strict=True)
    assert not (tmp_path / "f").exists()


def test_chance_and_another_dtype_prove_nothing(tmp_path: Path) -> None:
    base, one = base_of(tmp_path / "base", torch.float32, narrow=True), adapter(tmp_path / "one", 1, 1e-2)
    for name, options in (("cast", {"dtype": "bfloat16"}), ("chance", {"dtype": "bfloat16", "rounding": "stochastic"})):
        loraformat.merge(base, [one], tmp_path / name, **options)
        report = loraformat.unmerge(tmp_path / name, [one], tmp_path / f"{name}-out")
        assert (report.data.proof, report.data.is_exact) == ("none", False)


def test_a_method_other_than_the_sum_proves_nothing(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", torch.bfloat16, narrow=True)
    both = [adapter(tmp_path / "one", 1, 1e-2), adapter(tmp_path / "two", 2, 1e-2)]
    loraformat.merge(base, both, tmp_path / "merged", method="ties", density=0.5)
    assert loraformat.unmerge(tmp_path / "merged", both, tmp_path / "out").data.proof == "none"
    report = loraformat.unmerge(tmp_path / "merged", both, tmp_path / "with-base", base=base)
    assert report.data.is_exact, "the manifest says which method"
    assert report.data.weights[0].unlike == 0


def test_a_wrong_adapter_shows_in_the_values(tmp_path: Path) -> None:
    """Where the base's numbers are further apart than the merged ones, not every number can come out of a merge."""
    base, one = base_of(tmp_path / "base", torch.bfloat16), adapter(tmp_path / "one", 1, 0.3)
    other, merged = adapter(tmp_path / "other", 2, 0.3), tmp_path / "merged"
    loraformat.merge(base, [one], merged)
    right, wrong = (
        loraformat.unmerge(merged, [each], tmp_path / f"out-{each.name}", dry_run=True).data.weights[0]
        for each in (one, other)
    )
    assert right.unlike == 0
    assert wrong.unlike > 0.05 * wrong.values


def test_the_base_gives_back_its_bytes(tmp_path: Path) -> None:
    base, one = base_of(tmp_path / "base", torch.bfloat16), adapter(tmp_path / "one", 1, 1e-1)
    loraformat.merge(base, [one], tmp_path / "merged")
    report = loraformat.unmerge(tmp_path / "merged", [one], tmp_path / "out", base=base)
    assert (report.data.proof, report.data.is_exact) == ("base", True)
    assert report.data.weights[0].unlike == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert loraformat.verify(tmp_path / "out", base=base).ok


def test_a_head_that_shares_its_bytes_with_a_merged_embedding_is_that_embedding(tmp_path: Path) -> None:
    fixtures = Path(__file__).parents[3] / "fixtures" / "minigpt"
    base, one = fixtures / "base", fixtures / "lora_adapter"
    loraformat.merge(base, [one], tmp_path / "merged", alpha=1.0)
    report = loraformat.unmerge(tmp_path / "merged", [one], tmp_path / "out", alpha=1.0, base=base)
    assert (report.data.proof, report.data.is_exact) == ("base", True)
    original = torch.load(base / "model.pt", weights_only=True)
    found = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in original.items())
    merged = torch.load(tmp_path / "merged" / "model.pt", weights_only=True)
    merged["lm_head.weight"] = merged["lm_head.weight"] + 1
    torch.save(merged, tmp_path / "merged" / "model.pt")
    with pytest.raises(MergeError, match=r"no adapter changes: lm_head\.weight"):
        loraformat.unmerge(tmp_path / "merged", [one], tmp_path / "again", alpha=1.0, base=base)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return llama()


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_by_peft_is_known_by_its_base(
    tmp_path: Path, tensors: Tensors, kind: dict[str, Any], dtype: torch.dtype
) -> None:
    import peft

    base = write(tmp_path / "base", tensors, dtype)
    model = model_of(base).to(dtype)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **kind)
    )
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if value.requires_grad and "lora_B" in name:
                value.copy_(0.05 * torch.randn_like(value))
            elif "modules_to_save" in name:
                value.add_(0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    report = loraformat.unmerge(tmp_path / "merged", [tmp_path / "adapter"], tmp_path / "out", base=base)
    assert report.data.is_exact
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    if "use_rslora" not in kind:
        with pytest.raises(UnsupportedUpdate, match=r"DoRA|replaces"):
            loraformat.unmerge(tmp_path / "merged", [tmp_path / "adapter"], tmp_path / "without")
        assert not (tmp_path / "without").exists()


def refused(*arguments: Any, **options: Any) -> LoraFormatError:
    with pytest.raises(LoraFormatError) as found:
        loraformat.unmerge(*arguments, **options)
    return found.value


def test_a_model_that_is_not_the_base_with_the_adapters_is_refused(tmp_path: Path) -> None:
    base, one = base_of(tmp_path / "base", torch.bfloat16), adapter(tmp_path / "one", 1, 1e-1)
    other, merged, out = adapter(tmp_path / "other", 2, 1e-1), tmp_path / "merged", tmp_path / "out"
    loraformat.merge(base, [one], merged)
    found = refused(merged, [other], out, base=base)
    assert isinstance(found, MergeError)
    assert f"values of {NAME} differ from those of a merge" in found.message
    assert isinstance(refused(merged, [f"{one}=0.5"], out, base=base), MergeError)
    trained = {**read(merged), "other": torch.full((3,), 2.0, dtype=torch.bfloat16)}
    after = write(tmp_path / "after", trained)
    assert "1 tensor changed that no adapter changes: other" in refused(after, [one], out, base=base).message
    assert not out.exists()
    report = loraformat.unmerge(after, [one], out, base=base, force=True)
    assert (report.data.proof, report.data.is_exact) == ("none", False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [0.9, 1.1])
def test_a_strength_that_is_nearly_right_is_noticed(tmp_path: Path, dtype: torch.dtype, strength: float) -> None:
    base, one = base_of(tmp_path / "base", dtype), adapter(tmp_path / "one", 1, 1e-2)
    loraformat.merge(base, [one], tmp_path / "merged")
    found = refused(tmp_path / "merged", [f"{one}={strength}"], tmp_path / "out", base=base)
    assert "differ from those of a merge" in found.message


def test_not_finite_and_cut_files(tmp_path: Path) -> None:
    base, one = base_of(tmp_path / "base", torch.bfloat16), adapter(tmp_path / "one", 1, 1e-1)
    merged = tmp_path / "merged"
    loraformat.merge(base, [one], merged)
    bad = adapter(tmp_path / "bad", 1, float("nan"))
    file = merged / "model.safetensors"
    whole = file.read_bytes()
    for arguments in (["unmerge", str(merged), str(bad)], ["unmerge", str(merged), str(one), "--base", str(one)]):
        done = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out")])
        assert done.exit_code in (1, 3), done.output
        assert done.stderr.count("error") == 1, done.stderr
    file.write_bytes(whole[:-7])
    done = CliRunner().invoke(main, ["unmerge", str(merged), str(one), "-o", str(tmp_path / "out")])
    assert done.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_json_and_text(tmp_path: Path) -> None:
    base, one = base_of(tmp_path / "base", torch.bfloat16), adapter(tmp_path / "one", 1, 1e-1)
    loraformat.merge(base, [one], tmp_path / "merged")
    arguments = ["unmerge", str(tmp_path / "merged"), str(one), "-o", str(tmp_path / "out"), "--dry-run"]
    document = json.loads(CliRunner().invoke(main, [*arguments, "--format", "json"]).stdout)
    assert next(iter(loraformat.schema.check("report", document)), None) is None  # type: ignore[attr-defined]
    unknown = document["data"]["weights"][0]["unknown"]
    text = CliRunner().invoke(main, arguments).stdout
    assert f"{unknown} of 960 values" in text
    assert np.isfinite(document["data"]["weights"][0]["bound"])


@pytest.mark.parametrize("option", ["dequantize", "keep_quantized"])
def test_a_quantized_base_comes_back_in_its_codes(tmp_path: Path, option: str) -> None:
    base = Path("fixtures/quantized/nf4")
    loraformat.init(base, tmp_path / "one", rank=2, target=["q_proj"])
    file = tmp_path / "one" / "adapter_model.safetensors"
    factors = {name: torch.randn_like(value) * 0.1 for name, value in load_file(file).items()}
    save_file(factors, file)
    loraformat.merge(base, [tmp_path / "one"], tmp_path / "merged", **{option: True})
    report = loraformat.unmerge(tmp_path / "merged", [tmp_path / "one"], tmp_path / "out", base=base)
    assert report.data.is_exact
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def changed(merged: Path, name: str) -> None:
    """Add 1 to the first value of a tensor; the header stays as it is."""
    file = merged / "model.safetensors"
    values = load_file(file)
    values[name].view(-1)[0] += 1
    save_file(values, file, metadata={"format": "pt"})


@pytest.mark.parametrize("what", ["tensor", "config.json", "new.json", "digests", "missing digests"])
def test_a_change_anywhere_in_the_model_takes_the_proof_away(tmp_path: Path, what: str) -> None:
    base, one = base_of(tmp_path / "base", torch.bfloat16, narrow=True), adapter(tmp_path / "one", 1, 1e-2)
    merged = tmp_path / "merged"
    loraformat.merge(base, [one], merged)
    assert loraformat.unmerge(merged, [one], tmp_path / "first", strict=True).data.is_exact
    digests = merged / "loraformat.digests.json"
    if what == "tensor":
        changed(merged, "other")
    elif what == "digests":
        digests.write_text(digests.read_text().replace('"nbytes":', '"nbytes": '))
    elif what == "missing digests":
        digests.unlink()
    else:
        (merged / what).write_text(json.dumps({"vocab_size": 97}))
    report = loraformat.unmerge(merged, [one], tmp_path / "out")
    assert (report.data.proof, report.data.is_exact) == ("none", False)
    named = {"tensor": "other", "digests": "loraformat.digests.json", "missing digests": "copied tensors"}
    assert named.get(what, what) in report.data.doubt
    assert report.data.doubt in str(report)
    assert "the output is the base" not in str(report)
    assert "the base's tensors" not in str(report)
    with pytest.raises(AdapterRefused, match="cannot prove"):
        loraformat.unmerge(merged, [one], tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_copied_bytes_without_digests_are_not_proved(tmp_path: Path) -> None:
    base, one = base_of(tmp_path / "base", torch.bfloat16, narrow=True), adapter(tmp_path / "one", 1, 1e-2)
    loraformat.merge(base, [one], tmp_path / "merged", digests="none")
    report = loraformat.unmerge(tmp_path / "merged", [one], tmp_path / "out")
    assert (report.data.proof, report.data.is_exact) == ("none", False)
    assert "copied tensors have no digests" in report.data.doubt


def test_a_tied_base_whose_head_the_merge_parted_is_not_proved_and_comes_back_with_the_base(tmp_path: Path) -> None:
    tied = llama(tie_word_embeddings=True)
    tied.pop("lm_head.weight", None)
    base = write(tmp_path / "base", tied, torch.bfloat16, tie_word_embeddings=True)
    one, merged = tmp_path / "one", tmp_path / "merged"
    one.mkdir()
    factors = {"A": torch.randn(2, 32) * 1e-3, "B": torch.randn(96, 2) * 1e-3}
    save_file(
        {f"base_model.model.lm_head.lora_{key}.weight": value for key, value in factors.items()},
        one / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
    (one / "adapter_config.json").write_text(json.dumps(config))
    loraformat.merge(base, [one], merged)
    assert "lm_head.weight" in read(merged)
    report = loraformat.unmerge(merged, [one], tmp_path / "out")
    assert (report.data.proof, report.data.is_exact) == ("none", False)
    assert "config.json differs from the base" in report.data.doubt
    assert loraformat.unmerge(merged, [one], tmp_path / "exact", base=base).data.is_exact
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "exact" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("with_base", [False, True])
def test_weights_that_were_put_into_codes_again_are_refused_for_that(tmp_path: Path, *, with_base: bool) -> None:
    base = Path("fixtures/quantized/nf4")
    loraformat.init(base, tmp_path / "one", rank=2, target=["q_proj"])
    file = tmp_path / "one" / "adapter_model.safetensors"
    save_file({name: torch.randn_like(value) * 0.1 for name, value in load_file(file).items()}, file)
    loraformat.merge(base, [tmp_path / "one"], tmp_path / "merged", requantize=True, least_kept=0)
    more = {"base": base} if with_base else {}
    found = refused(tmp_path / "merged", [tmp_path / "one"], tmp_path / "out", **more)
    assert isinstance(found, UnsupportedUpdate)
    text = f"{found} {found.hint}"
    assert "quantized again" in text
    assert "keep or download the original base instead" in text
    assert "--dequantize" not in text
    assert not (tmp_path / "out").exists()


def test_exchanged_arguments_are_named_by_this_verb(tmp_path: Path) -> None:
    base, one = write(tmp_path / "base", llama()), adapter(tmp_path / "one", 1, 1e-2)
    found = refused(one, [base], tmp_path / "out")
    assert "are the arguments swapped?" in found.message
    assert "unmerge MERGED ADAPTER" in f"{found} {found.hint}"
    assert "merge BASE" not in f"{found} {found.hint}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_are_counted_and_not_known(tmp_path: Path, dtype: torch.dtype) -> None:
    base, one = base_of(tmp_path / "base", dtype, narrow=True), adapter(tmp_path / "one", 1, 1e-2)
    values = read(base)
    values[NAME][0, :3] = float("nan")
    values[NAME][1, 0], values[NAME][1, 1] = float("inf"), float("-inf")
    save_file(values, base / "model.safetensors", metadata={"format": "pt"})
    loraformat.merge(base, [one], tmp_path / "merged")
    report = loraformat.unmerge(tmp_path / "merged", [one], tmp_path / "out")
    (record,) = report.data.weights
    assert (record.not_finite, record.unknown, record.unlike) == (5, 5, 0)
    assert (report.data.proof, report.data.is_exact) == ("manifest", False)
    assert "unknown 5 of 960 values (0.52%), 5 of them not finite (NaN or infinity)" in str(report)
    assert "unknown none" not in str(report)
    assert record.bound == 0
    found, before = read(tmp_path / "out")[NAME], read(base)[NAME]
    assert torch.equal(found[before.isfinite()], before[before.isfinite()])
    with pytest.raises(AdapterRefused, match="5 values of 960 cannot be known"):
        loraformat.unmerge(tmp_path / "merged", [one], tmp_path / "strict", strict=True)


def test_shards_and_other_files_of_the_base_are_proved_too(tmp_path: Path) -> None:
    base, one = base_of(tmp_path / "base", torch.bfloat16, narrow=True), adapter(tmp_path / "one", 1, 1e-2)
    (base / "tokenizer.json").write_text("{}")
    torch.save({"lr": torch.ones(1)}, base / "training_args.bin")
    merged, out = tmp_path / "merged", tmp_path / "out"
    loraformat.merge(base, [one], merged, max_shard_nbytes=1500)
    assert (merged / "model.safetensors.index.json").exists()
    loraformat.unmerge(merged, [one], out, strict=True)
    assert all(torch.equal(value, read(base)[name]) for name, value in read(out).items())
    (merged / "tokenizer.json").write_text("[]")
    assert loraformat.unmerge(merged, [one], tmp_path / "other").data.proof == "none"


def test_a_tie_that_config_json_still_claims_is_a_doubt(tmp_path: Path) -> None:
    """T5 has one key for the tie and for a scaling of the head, so that a merge leaves it in config.json."""
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 96}
    base, one = tmp_path / "base", tmp_path / "one"
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(base)
    one.mkdir()
    factors = {"A": torch.randn(2, 32) * 1e-2, "B": torch.randn(96, 2) * 1e-2}
    save_file(
        {f"base_model.model.lm_head.lora_{key}.weight": value for key, value in factors.items()},
        one / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]}
    (one / "adapter_config.json").write_text(json.dumps(config))
    loraformat.merge(base, [one], tmp_path / "merged")
    assert "lm_head.weight" in read(tmp_path / "merged")
    assert "lm_head.weight" not in read(base)
    report = loraformat.unmerge(tmp_path / "merged", [one], tmp_path / "out")
    assert (report.data.proof, report.data.is_exact) == ("none", False)
    assert "the merge may have untied them" in report.data.doubt


def test_a_tokenizer_of_the_adapter_stays_and_the_tensors_are_proved(tmp_path: Path) -> None:
    base, one = base_of(tmp_path / "base", torch.bfloat16, narrow=True), adapter(tmp_path / "one", 1, 1e-2)
    (one / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (base / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    loraformat.merge(base, [one], tmp_path / "merged")
    report = loraformat.unmerge(tmp_path / "merged", [one], tmp_path / "out")
    assert report.data.is_exact
    assert "the output has the base's tensors" in str(report)
    assert torch.equal(read(tmp_path / "out")[NAME], read(base)[NAME])
    loraformat.unmerge(tmp_path / "merged", [one], tmp_path / "exact", base=base)
    name = "tokenizer_config.json"
    assert (tmp_path / "exact" / name).read_bytes() == (base / name).read_bytes()
