"""Merges into a pipeline of diffusers: each component by a float64 sum, everything else byte by byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from oracle import dense
from safetensors.torch import load_file, save_file
from torch import Tensor

import loraformat
from loraformat.cli import main
from loraformat.errors import LoraFormatError, StorageError, UnmatchedUpdate, UsageError

GOOD = Path(__file__).parents[2] / "fixtures" / "good"
ADAPTERS = ["kohya/tiny-flux", "comfy/tiny-flux", "diffusers/tiny-flux", "xlabs/tiny-flux", "lycoris/loha-lokr"]


def adapter(case: str) -> Path:
    """The file of a fixture, or of a path."""
    if Path(case).is_file():
        return Path(case)
    (file,) = (GOOD / case).glob("*.safetensors")
    return file


def pipeline(folder: Path, case: str) -> Path:
    """Random weights for all that an adapter changes, components that it does not change, and other files."""
    found = loraformat.load_adapter(adapter(case))
    tensors: dict[str, dict[str, Tensor]] = {"vae": {"decoder.conv_in.weight": torch.randn(4, 4)}}
    for name, chain in found.updates.items():
        component, _, weight = name.partition(".")
        shape = chain[0].shape if hasattr(chain[0], "shape") else chain[0].delta.shape
        tensors.setdefault(component, {})[weight] = torch.randn(*shape)
    folder.mkdir()
    index = {"_class_name": "FluxPipeline", "scheduler": ["diffusers", "S"]}
    for component, weights in tensors.items():
        (folder / component).mkdir()
        is_text = component.startswith("text_encoder")
        kind = ["transformers", "CLIPTextModel"] if is_text else ["diffusers", "FluxTransformer2DModel"]
        index[component] = kind
        (folder / component / "config.json").write_text(json.dumps({"_class_name": kind[1]}))
        name = "model.safetensors" if is_text else "diffusion_pytorch_model.safetensors"
        save_file(weights, folder / component / name)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("a pipeline")
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.parent.name}.{name}": value
        for path in folder.rglob("*.safetensors")
        for name, value in load_file(path).items()
    }


def assert_sum(base: Path, out: Path, case: str, strengths: dict[str, float], rest: float = 1.0) -> None:
    before, after = weights_of(base), weights_of(out)
    assert before.keys() == after.keys()
    changed = loraformat.load_adapter(adapter(case), base=str(base)).updates
    for name, value in before.items():
        factor = strengths.get(name.partition(".")[0], rest)
        wanted = value.double() + sum(factor * dense(one).reshape(value.shape) for one in changed.get(name, ()))
        torch.testing.assert_close(after[name].double(), wanted, rtol=1e-6, atol=1e-6)


def kohya(file: Path, modules: dict[str, tuple[int, float]]) -> Path:
    """A file of kohya's scripts: module → (rank, alpha), each of 8 x 8."""
    tensors = {}
    for module, (rank, alpha) in modules.items():
        tensors[f"{module}.lora_down.weight"] = torch.randn(rank, 8)
        tensors[f"{module}.lora_up.weight"] = torch.randn(8, rank)
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return file


def test_peft_folders_are_merged_with_the_scales_of_each_components_config(tmp_path: Path) -> None:
    """Ranks and alphas that differ within a component and between components."""
    block, layer = (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1",
        "lora_te_text_model_encoder_layers",
    )
    modules = {f"{block}_to_q": (4, 2.0), f"{block}_to_k": (2, 6.0), f"{layer}_0_self_attn_q_proj": (4, 12.0)}
    file = kohya(tmp_path / "style.safetensors", modules)
    loraformat.convert(file, tmp_path / "peft", to="peft")
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == ["text_encoder", "unet"]
    case = str(file)
    base = pipeline(tmp_path / "base", case)
    report = loraformat.merge(base, [tmp_path / "peft"], tmp_path / "out", verify="full")
    for component in ("unet", "text_encoder"):  # each folder is an adapter of its component too
        loraformat.merge(base / component, [tmp_path / "peft" / component], tmp_path / component)
        (file,) = (base / component).glob("*.safetensors")
        alone, together = tmp_path / component / file.name, tmp_path / "out" / component / file.name
        assert alone.read_bytes() == together.read_bytes()
    assert report.data.checked.compared == report.data.checked.changed == 3
    assert report.data.checked.unscaled == 0
    assert_sum(base, tmp_path / "out", case, {})


@pytest.mark.parametrize(("options", "scale"), [({}, 1.0), ({"alpha": 8.0}, 4.0), ({"scale": 0.5}, 0.5)])
def test_what_a_file_does_not_state_may_be_given(tmp_path: Path, options: dict[str, float], scale: float) -> None:
    """A file of rank 2 without a header and without alphas."""
    base, file = pipeline(tmp_path / "base", "diffusers/tiny-flux"), tmp_path / "plain.safetensors"
    factors = load_file(adapter("diffusers/tiny-flux"))
    save_file(factors, file)
    assumptions = loraformat.Assumptions(**options)
    report = loraformat.merge(base, [file], tmp_path / "out", assumptions=assumptions, verify="full")
    assert report.data.checked.unscaled == 0
    assert report.data.checked.compared == report.data.checked.changed > 0
    before, after = weights_of(base), weights_of(tmp_path / "out")
    for name, down in factors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            update = scale * factors[f"{module}.lora_B.weight"].double() @ down.double()
            weight = f"{module}.weight"
            torch.testing.assert_close(after[weight].double(), before[weight].double() + update, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"alpha": 8.0}, {"scale": 0.5}])
def test_a_product_without_a_rank_has_no_scale_to_give(tmp_path: Path, options: dict[str, float]) -> None:
    """LoKr of two whole matrices, in which alpha and rank have no effect."""
    module, file = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", tmp_path / "lokr.safetensors"
    left, right = torch.randn(2, 2), torch.randn(4, 4)
    save_file({f"{module}.lokr_w1": left, f"{module}.lokr_w2": right}, file)
    base = pipeline(tmp_path / "base", str(file))
    loraformat.merge(base, [file], tmp_path / "out", assumptions=loraformat.Assumptions(**options), verify="full")
    before, after = weights_of(base), weights_of(tmp_path / "out")
    (changed,) = [name for name in before if not torch.equal(before[name], after[name])]
    wanted = before[changed].double() + torch.kron(left.double(), right.double())
    torch.testing.assert_close(after[changed].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("options", "option"), [({"alpha": 8.0}, "--alpha"), ({"scale": 0.5}, "--assume")])
def test_the_option_that_contradicts_a_file_is_named(tmp_path: Path, options: dict[str, float], option: str) -> None:
    base = pipeline(tmp_path / "base", "diffusers/tiny-flux")
    assumptions = loraformat.Assumptions(**options)
    with pytest.raises(LoraFormatError, match=r"states a scale of 1\.5") as raised:
        loraformat.merge(base, [adapter("diffusers/tiny-flux")], tmp_path / "out", assumptions=assumptions)
    assert raised.value.hint == f"leave {option} out, or correct the file"


@pytest.mark.parametrize("case", ADAPTERS)
def test_each_component_gets_its_updates_and_all_else_is_copied(tmp_path: Path, case: str) -> None:
    base = pipeline(tmp_path / "base", case)
    report = loraformat.merge(base, [adapter(case)], tmp_path / "out")
    assert_sum(base, tmp_path / "out", case, {})
    for path in base.rglob("*"):
        copy = tmp_path / "out" / path.relative_to(base)
        assert copy.exists()
        if path.is_file() and path.parent.name not in {name.partition(".")[0] for name in changed_names(case)}:
            assert copy.read_bytes() == path.read_bytes()
    assert report.data.tensors_touched == len(changed_names(case))
    assert report.data.checked.compared == report.data.checked.changed == len(changed_names(case))
    assert sorted(report.data.files) == sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    )


def changed_names(case: str) -> set[str]:
    return set(loraformat.load_adapter(adapter(case)).updates)


def test_strengths_of_components_and_of_the_adapter_multiply(tmp_path: Path) -> None:
    case = "kohya/tiny-flux"
    base = pipeline(tmp_path / "base", case)
    given = {"transformer": 0.25, "text_encoder": 2.0}
    used = {name: given[name] for name in given if (base / name).is_dir()}
    loraformat.merge(base, [f"{adapter(case)}=0.5"], tmp_path / "out", component_strengths=used)
    assert_sum(base, tmp_path / "out", case, {name: 0.5 * factor for name, factor in used.items()}, 0.5)


def test_the_command_line_takes_a_strength_for_a_component(tmp_path: Path) -> None:
    case = "kohya/tiny-flux"
    base = pipeline(tmp_path / "base", case)
    arguments = ["merge", str(base), str(adapter(case)), "-o", str(tmp_path / "out"), "--strength"]
    done = CliRunner().invoke(main, [*arguments, "transformer=0.5"])
    assert done.exit_code == 0, done.output
    assert_sum(base, tmp_path / "out", case, {"transformer": 0.5})
    for wrong in ("transformer", "transformer=x", "=1", "transformer=nan"):
        assert CliRunner().invoke(main, [*arguments, wrong]).exit_code == 2
    unknown = CliRunner().invoke(main, [*arguments[:4], str(tmp_path / "other"), "--strength", "unet=1"])
    assert unknown.exit_code == 2
    assert "its components are" in unknown.output


def test_a_strength_for_a_component_that_no_adapter_changes_is_refused(tmp_path: Path) -> None:
    case = "kohya/tiny-flux"
    base = pipeline(tmp_path / "base", case)
    changed = sorted({name.partition(".")[0] for name in changed_names(case)})
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="no adapter changes vae") as refused:
            loraformat.merge(base, [adapter(case)], tmp_path / "out", component_strengths={"vae": 0.5}, dry_run=dry_run)
        assert refused.value.hint == f"what is changed: {', '.join(changed)}"
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_what_an_earlier_merge_wrote_and_nothing_else(tmp_path: Path) -> None:
    case = "kohya/tiny-flux"
    base, out = pipeline(tmp_path / "base", case), tmp_path / "out"
    (base / "feature_extractor").mkdir()  # without files
    loraformat.merge(base, [adapter(case)], out)
    before = files_of(out)
    with pytest.raises(StorageError, match="exists already") as refused:
        loraformat.merge(base, [f"{adapter(case)}=0.5"], out)
    assert refused.value.hint == "replace it with --overwrite"
    assert files_of(out) == before
    loraformat.merge(base, [f"{adapter(case)}=0.5"], out, overwrite=True)
    assert_sum(base, out, case, {}, 0.5)
    for mine in ("mine", "vae/mine", "unknown/mine"):
        (out / mine).parent.mkdir(exist_ok=True)
        (out / mine).write_text("kept")
        half = files_of(out)
        with pytest.raises(StorageError, match="which no earlier run of this command wrote"):
            loraformat.merge(base, [adapter(case)], out, overwrite=True)
        assert files_of(out) == half
        (out / mine).unlink()
        if not list((out / mine).parent.iterdir()):
            (out / mine).parent.rmdir()
    with pytest.raises(StorageError, match="is, contains, or lies inside"):
        loraformat.merge(base, [adapter(case)], base / "vae", overwrite=True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def interrupted(base: Path, out: Path, case: str, *, after: float) -> Path:
    """The unfinished output of a run that a signal ended when it had done some of the bytes."""

    def stop(done: int, total: int) -> None:
        if done >= after * total > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loraformat.merge(base, [adapter(case)], out, resume=True, progress=stop)
    assert not out.exists()
    (left,) = out.parent.glob(f".{out.name}.loraformat-*.partial")
    return left


@pytest.mark.parametrize("after", [0.01, 0.5, 1.0])
def test_an_interrupted_merge_goes_on(tmp_path: Path, after: float) -> None:
    case = "kohya/tiny-flux"
    base, out = pipeline(tmp_path / "base", case), tmp_path / "out"
    loraformat.merge(base, [adapter(case)], tmp_path / "whole")
    interrupted(base, out, case, after=after)
    met: list[str] = []
    loraformat.merge(
        base,
        [adapter(case)],
        out,
        resume=True,
        announce=lambda findings: met.extend(finding.message for finding in findings),
    )
    wanted = files_of(tmp_path / "whole")
    assert {name: data for name, data in files_of(out).items() if "loraformat." not in name} == {
        name: data for name, data in wanted.items() if "loraformat." not in name
    }
    assert files_of(out).keys() == wanted.keys()
    assert loraformat.verify(out, base=base).ok
    taken_over = [message for message in met if "complete files of an unfinished output were reused" in message]
    assert after < 1.0 or taken_over
    assert not list(tmp_path.glob(".out*"))


def test_what_another_run_left_is_not_taken_over(tmp_path: Path) -> None:
    """Another strength, a changed file of the base, and a component that the pipeline does not have."""
    case = "kohya/tiny-flux"
    base, out = pipeline(tmp_path / "base", case), tmp_path / "out"
    left = interrupted(base, out, case, after=1.0)
    (left / "stranger").mkdir()
    (left / "stranger" / "file").write_text("x")
    (left / "vae" / "file").write_text("x")
    (base / "vae" / "config.json").write_text('{"changed": true}')
    loraformat.merge(base, [f"{adapter(case)}=0.5"], out, resume=True)
    loraformat.merge(base, [f"{adapter(case)}=0.5"], tmp_path / "whole")
    assert_sum(base, out, case, {}, 0.5)
    assert files_of(out).keys() == files_of(tmp_path / "whole").keys()
    assert (out / "vae" / "config.json").read_text() == '{"changed": true}'


def test_threads_and_windows_change_no_byte(tmp_path: Path) -> None:
    case = "kohya/tiny-flux"
    base = pipeline(tmp_path / "base", case)
    for number, (jobs, memory) in enumerate([(1, 64 << 20), (3, 1 << 12)]):
        loraformat.merge(base, [adapter(case)], tmp_path / str(number), jobs=jobs, memory_nbytes=memory)
    one, other = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.safetensors")} for n in "01"
    )
    assert one == other


def test_verify_looks_at_every_component(tmp_path: Path) -> None:
    case = "kohya/tiny-flux"
    base, out = pipeline(tmp_path / "base", case), tmp_path / "out"
    loraformat.merge(base, [adapter(case)], out)
    sound = loraformat.verify(out, base=base)
    assert sound.ok
    assert sound.data.bytes_read == sound.data.bytes_total
    alone = loraformat.verify(out)
    assert alone.ok
    assert alone.data.bytes_read < alone.data.bytes_total
    for path in ("vae/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        content = (out / path).read_bytes()
        (out / path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        found = loraformat.verify(out, base=base)
        assert found.findings[0].where.startswith((path, f"{path.partition('/')[0]}."))
        assert not found.ok
        (out / path).write_bytes(content)


def test_a_pipeline_that_was_not_merged_has_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(LoraFormatError, match="no component has a"):
        loraformat.verify(pipeline(tmp_path / "base", "kohya/tiny-flux"))


def test_an_update_of_a_component_that_is_not_there_is_refused(tmp_path: Path) -> None:
    import shutil

    case = "kohya/tiny-flux"
    base = pipeline(tmp_path / "base", case)
    gone = min(name.partition(".")[0] for name in changed_names(case))
    shutil.rmtree(base / gone)
    with pytest.raises(LoraFormatError):
        loraformat.merge(base, [adapter(case)], tmp_path / "out")
    with pytest.raises((UnmatchedUpdate, LoraFormatError)):
        loraformat.merge(base, [adapter(case)], tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{"container": "torch"}, {"dequantize": True}, {"keep_quantized": True}, {"as_trained": "nf4"}]
)
def test_options_that_pipelines_do_not_have_are_refused(tmp_path: Path, options: dict[str, object]) -> None:
    base = pipeline(tmp_path / "base", "kohya/tiny-flux")
    with pytest.raises(UsageError, match="not supported for a pipeline"):
        loraformat.merge(base, [adapter("kohya/tiny-flux")], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_of_this_machine_is_not_to_be_downloaded(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", "kohya/tiny-flux")
    with pytest.raises(UsageError, match="upload it with `hf upload`"):
        loraformat.merge(base, [adapter("kohya/tiny-flux")], "hf://owner/name")


def test_one_component_is_not_given_the_updates_of_others_and_pick_takes_them_out(tmp_path: Path) -> None:
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    modules = {f"{block}_attn1_to_q": (2, 1.0), "lora_te_text_model_encoder_layers_0_mlp_fc1": (2, 1.0)}
    file = kohya(tmp_path / "style.safetensors", modules)
    base = pipeline(tmp_path / "base", str(file))
    with pytest.raises(LoraFormatError, match="no weights of this component") as refused:
        loraformat.merge(base / "unet", [file], tmp_path / "out")
    assert "pick ADAPTER --select 'unet.*'" in str(refused.value)
    loraformat.pick(file, tmp_path / "unet-only", select=["unet.*"])
    report = loraformat.merge(base / "unet", [tmp_path / "unet-only"], tmp_path / "out")
    assert report.data.tensors_touched == 1


def test_one_model_has_no_strength_of_components(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter changes unet"):
        loraformat.merge(
            "fixtures/minigpt/base",
            ["fixtures/minigpt/lora_adapter"],
            tmp_path / "out",
            alpha=1.0,
            component_strengths={"unet": 1.0},
        )


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", "kohya/tiny-flux")
    report = loraformat.merge(base, [adapter("kohya/tiny-flux")], tmp_path / "out", dry_run=True)
    assert report.data.is_dry_run
    done = loraformat.merge(base, [adapter("kohya/tiny-flux")], tmp_path / "done")
    assert report.data.files == done.data.files == tuple(files_of(tmp_path / "done"))
    assert report.data.tensors_touched == len(changed_names("kohya/tiny-flux"))
    assert not (tmp_path / "out").exists()


def test_folders_of_components_do_not_carry_the_stamp_of_the_pipeline(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", "kohya/tiny-flux")
    loraformat.stamp(adapter("kohya/tiny-flux"), base, tmp_path / "stamped")
    (stamped,) = (tmp_path / "stamped").glob("*.safetensors")
    report = loraformat.convert(stamped, tmp_path / "folders", to="peft")
    assert any("base_fingerprint" in each.message for each in report.findings)
    for folder in (path for path in (tmp_path / "folders").iterdir() if path.is_dir()):
        assert loraformat.load_adapter(folder).config.base_fingerprint is None
        loraformat.merge(base / folder.name, [folder], tmp_path / f"out-{folder.name}")
