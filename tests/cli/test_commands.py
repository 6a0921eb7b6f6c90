"""The commands as a user types them: exit codes, streams, and what is left on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from loraformat.cli import COMMANDS, main
from loraformat.jobs.demo import make_example
from loraformat.schema import check


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    make_example(str(folder))
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def reports_json(result: Result) -> dict:
    report = json.loads(result.stdout)
    assert list(check("report", report)) == []
    return report


def faults(report: dict) -> list[str]:
    """The codes of errors and warnings; notes are none."""
    return [finding["code"] for finding in report["findings"] if finding["severity"] != "info"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_says_what_the_list_says(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    assert command in run("--help").stdout


def test_a_command_that_does_not_exist_is_a_usage_error() -> None:
    assert run("mrege").exit_code == 2


def test_inspect_says_what_is_known_without_alpha(example: Path) -> None:
    report = reports_json(run("inspect", example / "adapter", "--norms", "--format", "json"))
    assert report["format"] == "native"
    by_kind = {record["kind"] for record in report["data"]["weights"]}
    assert by_kind == {"low-rank", "replace"}
    assert all(record["scale"] is None and record["norm"] is None for record in report["data"]["weights"])


def test_inspect_norms_agree_with_the_dense_product(example: Path) -> None:
    arguments = (
        "inspect",
        example / "adapter",
        "--alpha",
        16,
        "--norms",
        "--base",
        example / "base",
        "--format",
        "json",
    )
    report = reports_json(run(*arguments))
    factors = torch.load(example / "adapter" / "lora_weights.pt", weights_only=True)
    norms = []
    for record in report["data"]["weights"]:
        if record["kind"] == "low-rank":
            module = record["weight"].removesuffix(".weight")
            dense = factors[f"{module}.lora_B"].double() @ factors[f"{module}.lora_A"].double() * 16 / 8
            norms.append(float(dense.norm()))
            assert record["norm"] == pytest.approx(norms[-1], rel=1e-9)
            assert (record["shape"], record["rank"], record["scale"]) == ([64, 64], 8, 2.0)
            assert record["parameters"] == 2 * 64 * 8
    weights = load_file(example / "base" / "model.safetensors")
    assert report["data"]["total_norm"] == pytest.approx(sum(n * n for n in norms) ** 0.5, rel=1e-9)
    base = sum(tensor.numel() for tensor in weights.values())
    own = 8 * 2 * 64 * 8 + 100 * 64
    assert report["data"]["share"] == pytest.approx(own / (base + own))


def test_validate_exits_1_on_errors_and_0_without(example: Path) -> None:
    failed = run("validate", example / "adapter", "--format", "json")
    assert failed.exit_code == 1
    assert faults(reports_json(failed)) == ["LF206"]
    passed = run("validate", example / "adapter", "--alpha", 16, "--base", example / "base", "--format", "json")
    assert (passed.exit_code, faults(reports_json(passed))) == (0, [])


def test_fail_on_and_ignore_move_the_verdict(example: Path) -> None:
    assert run("validate", example / "adapter", "--fail-on", "never").exit_code == 0
    assert run("validate", example / "adapter", "--ignore", "LF2").exit_code == 0
    assert run("validate", example / "adapter", "--select", "LF1").exit_code == 0


@pytest.mark.parametrize("verb", ["inspect", "validate"])
def test_a_path_that_does_not_exist_is_exit_3(verb: str, tmp_path: Path) -> None:
    result = run(verb, tmp_path / "nothing")
    assert result.exit_code == 3
    assert "no such file or folder" in result.stderr
    assert result.stdout == ""


def test_damaged_content_is_a_finding_of_validate_and_an_error_of_the_others(example: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("lora_config.json", "tokenizer.json", "embedding_weights.pt"):
        (folder / name).write_bytes((example / "adapter" / name).read_bytes())
    (folder / "lora_weights.pt").write_bytes((example / "adapter" / "lora_weights.pt").read_bytes()[:-100])
    report = run("validate", folder, "--format", "json")
    assert report.exit_code == 1
    assert len(faults(reports_json(report))) == 1
    for arguments in (("inspect", folder), ("merge", example / "base", folder, "-o", tmp_path / "out")):
        result = run(*arguments)
        assert result.exit_code == 3
        assert "lora_weights.pt" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_merge_without_a_known_scale_is_refused_and_names_alpha(example: Path, tmp_path: Path) -> None:
    result = run("merge", example / "base", example / "adapter", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "--alpha" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_stated_alpha_is_not_overridden(example: Path, tmp_path: Path) -> None:
    peft = tmp_path / "peft"
    assert run("convert", example / "adapter", "--to", "peft", "--alpha", 16, "-o", peft).exit_code == 0
    result = run("merge", example / "base", peft, "--alpha", 8, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "16" in result.stderr
    assert not (tmp_path / "out").exists()


def test_alpha_fills_those_of_several_adapters_that_state_none(example: Path, tmp_path: Path) -> None:
    base, silent, stating = example / "base", example / "adapter", tmp_path / "stating"
    config = tmp_path / "stating" / "adapter_config.json"
    run("convert", silent, "--to", "peft", "--alpha", 4, "-o", stating)
    weights = load_file(stating / "adapter_model.safetensors")
    factors = {name: tensor for name, tensor in weights.items() if "lora_" in name}
    save_file(factors, stating / "adapter_model.safetensors")
    assert json.loads(config.read_text())["lora_alpha"] == 4
    assert run("merge", base, silent, stating, "--alpha", 16, "-o", tmp_path / "both").exit_code == 0
    name = "model.layers.1.self_attn.v_proj"
    hand_written = torch.load(silent / "lora_weights.pt", weights_only=True)
    delta = hand_written[f"{name}.lora_B"].double() @ hand_written[f"{name}.lora_A"].double()
    before, after = (load_file(folder / "model.safetensors")[f"{name}.weight"] for folder in (base, tmp_path / "both"))
    expected = before.double() + 16 / 8 * delta + 4 / 8 * delta
    assert ((after.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-9).all()
    refused = run("merge", base, stating, stating, "--alpha", 16, "-o", tmp_path / "none")
    assert refused.exit_code == 2
    assert "every adapter states its own" in refused.stderr


def test_assume_is_the_long_form_of_alpha(example: Path, tmp_path: Path) -> None:
    short = run("merge", example / "base", example / "adapter", "--alpha", 16, "-o", tmp_path / "a")
    long = run("merge", example / "base", example / "adapter", "--assume", "alpha=16", "-o", tmp_path / "b")
    scale = run("merge", example / "base", example / "adapter", "--assume", "scale=2.0", "-o", tmp_path / "c")
    assert [result.exit_code for result in (short, long, scale)] == [0, 0, 0]
    merged = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert merged[0] == merged[1] == merged[2]


@pytest.mark.parametrize(
    "given", ["alpha", "alpha=x", "alpha=true", "rank=1.5", "beta=1", "scale=NaN", "fan_in_fan_out=1"]
)
def test_an_assumption_that_is_none_is_a_usage_error(example: Path, given: str) -> None:
    assert run("inspect", example / "adapter", "--assume", given).exit_code == 2


def test_assuming_twice_or_against_alpha_is_refused(example: Path) -> None:
    adapter = example / "adapter"
    assert run("inspect", adapter, "--assume", "alpha=1", "--assume", "alpha=2").exit_code == 2
    assert run("inspect", adapter, "--alpha", 1, "--assume", "alpha=2").exit_code == 2


def test_round_trip_through_peft_gives_the_same_merge(example: Path, tmp_path: Path) -> None:
    base, adapter = example / "base", example / "adapter"
    run("convert", adapter, "--to", "peft", "--alpha", 16, "-o", tmp_path / "peft")
    run("convert", tmp_path / "peft", "--to", "native", "--container", "pt", "-o", tmp_path / "native")
    assert (tmp_path / "native" / "lora_weights.pt").exists()
    for name in ("peft", "native"):
        assert run("merge", base, tmp_path / name, "-o", tmp_path / f"m-{name}").exit_code == 0
    direct = run("merge", base, adapter, "--alpha", 16, "-o", tmp_path / "m")
    assert direct.exit_code == 0
    expected = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert all((tmp_path / f"m-{name}" / "model.safetensors").read_bytes() == expected for name in ("peft", "native"))


def test_an_existing_output_is_refused_without_overwrite(example: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    arguments = ("merge", example / "base", example / "adapter", "--alpha", 16, "-o", out)
    refused = run(*arguments)
    assert refused.exit_code == 3
    assert "--overwrite" in refused.stderr
    assert run(*arguments, "--overwrite").exit_code == 3
    assert (out / "mine").read_text() == "keep"
    (out / "mine").unlink()
    for _ in range(2):  # an empty folder, and an earlier output
        assert run(*arguments, "--overwrite").exit_code == 0
    expected = [
        "config.json",
        "loraformat.digests.json",
        "loraformat.manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert sorted(path.name for path in out.iterdir()) == expected


def test_an_input_is_never_the_output(example: Path) -> None:
    before = (example / "base" / "model.safetensors").read_bytes()
    for out in (example / "base", example / "base" / "inside", example):
        arguments = ("merge", example / "base", example / "adapter", "--alpha", 16, "--overwrite", "-o", out)
        assert run(*arguments).exit_code == 3
    assert (example / "base" / "model.safetensors").read_bytes() == before


def test_what_is_left_out_of_the_base_is_said(example: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(example / "base", base)
    (base / "pytorch_model.bin").write_bytes(b"stale")
    (base / "original").mkdir()
    result = run("merge", base, example / "adapter", "--alpha", 16, "-o", tmp_path / "out", "--format", "json")
    assert result.exit_code == 0
    (finding,) = reports_json(result)["findings"]
    assert finding["code"] == "LF802"
    assert "pytorch_model.bin, original/" in finding["message"]
    assert "pytorch_model.bin, original/" in result.stderr


def test_a_dry_run_writes_nothing_and_prints_the_plan(example: Path, tmp_path: Path) -> None:
    arguments = ("merge", example / "base", example / "adapter", "--alpha", 16, "-o", tmp_path / "out", "--dry-run")
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0
    plan = reports_json(result)["data"]["plan"]
    assert list(check("merge-plan", plan)) == []
    assert len(plan["shards"][0]["edits"]) == 9
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments).exit_code == 0


@pytest.mark.parametrize("size", ["12XB", "-1", "1e3", ""])
def test_a_memory_size_that_is_none_is_a_usage_error(example: Path, tmp_path: Path, size: str) -> None:
    result = run("merge", example / "base", example / "adapter", "-o", tmp_path / "out", f"--memory={size}")
    assert result.exit_code == 2


def test_strict_refuses_what_a_format_cannot_keep(example: Path, tmp_path: Path) -> None:
    run("convert", example / "adapter", "--to", "peft", "--alpha", 16, "-o", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text()) | {"lora_dropout": 0.1}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    refused = run("convert", tmp_path / "peft", "--to", "native", "--strict", "-o", tmp_path / "native")
    assert refused.exit_code == 1
    assert "lora_dropout" in refused.stderr
    assert not (tmp_path / "native").exists()
    told = run("convert", tmp_path / "peft", "--to", "native", "-o", tmp_path / "native")
    assert told.exit_code == 0
    assert "lora_dropout" in told.stderr


def test_a_terminal_never_sees_what_a_file_hides_in_its_names(tmp_path: Path) -> None:
    module = "base_model.model.\x1b]0;owned\x07q_proj\u202e"
    tensors = {f"{module}.lora_A.weight": torch.zeros(2, 4), f"{module}.lora_B.weight": torch.zeros(4, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "\x1b[31m"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for verb in ("inspect", "validate"):
        result = run(verb, tmp_path)
        output = result.stdout + result.stderr
        assert not set(output) & set("\x1b\x07\u202e")


def test_explain_prints_the_page_of_a_code() -> None:
    assert "# LF206" in run("explain", "lf206").stdout
    assert run("explain", "LF999").exit_code == 2
    assert "LF402" in run("explain").stdout


def test_the_demo_ends_well(tmp_path: Path) -> None:
    result = run("demo", "-o", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert "demo: OK" in result.stdout


# Runs the command line, and stands still where the first weight file of an output is opened.
STOPS_AT_ITS_FIRST_FILE = """
import os, runpy, signal, sys
def stop(event, given, done=[]):
    if event == "open" and ".partial/model" in os.fsdecode(str(given[0])) and not done:
        done.append(True)
        os.kill(os.getpid(), signal.SIGSTOP)
sys.addaudithook(stop)
runpy.run_module("loraformat", run_name="__main__", alter_sys=True)
"""


def test_an_interrupted_merge_leaves_nothing(example: Path, tmp_path: Path) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        command = ["merge", example / "base", example / "adapter", "--alpha", 16, "-o", tmp_path / "out", "--jobs", 1]
        with subprocess.Popen(
            [sys.executable, "-c", STOPS_AT_ITS_FIRST_FILE, *map(str, command)], stderr=subprocess.PIPE, text=True
        ) as child:
            os.waitid(os.P_PID, child.pid, os.WSTOPPED)
            assert list(tmp_path.glob(".out.loraformat-*.partial"))
            os.kill(child.pid, number)
            os.kill(child.pid, signal.SIGCONT)
            _, said = child.communicate()
        assert child.returncode == code, said
        assert said.splitlines()[-1] == "interrupted: no partial output is left"
        assert list(tmp_path.iterdir()) == []


def test_verify_compares_a_merge_with_its_manifest(example: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("merge", example / "base", example / "adapter", "--alpha", 16, "-o", out).exit_code == 0
    passed = run("verify", out, "--format", "json")
    assert (passed.exit_code, reports_json(passed)["findings"]) == (0, [])
    (out / "config.json").write_text("{}")
    failed = run("verify", out)
    assert failed.exit_code == 1
    assert "error[LF804]" in failed.stdout
    assert run("verify", example / "base").exit_code == 3


def test_merge_options_that_change_bytes_are_in_the_manifest(example: Path, tmp_path: Path) -> None:
    more = ("--dtype", "bfloat16", "--rounding", "stochastic", "--seed", 3)
    files = ("--max-shard-size", "20kB", "--verify", "full", "--hash", "sha256")
    result = run("merge", example / "base", example / "adapter", "--alpha", 16, "-o", tmp_path / "out", *more, *files)
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out" / "loraformat.manifest.json").read_text())
    arithmetic = {"rounding": "stochastic", "seed": 3}
    assert manifest["options"] == {**arithmetic, "container": None, "dtype": "BF16", "max_shard_nbytes": 20_000}
    assert manifest["adapters"][0]["alpha"] == 16
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


INTERRUPTED_IMPORT = """
import signal, sys
from loraformat.cli import Terminated, _signals
sys.path.insert(0, sys.argv[1])
try:
    with _signals():
        import struck
        signal.pause()
except (Terminated, KeyboardInterrupt) as error:
    print("imported", sys.modules["struck"].WHOLE)
    print(type(error).__name__, *error.args)
"""


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Terminated 15")], ids=["int", "term"]
)
def test_a_signal_does_not_strike_in_the_middle_of_an_import(number: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "struck.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\nWHOLE = True\n")
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (child.stdout.splitlines(), child.returncode) == (["imported True", said], 0), child.stderr


@pytest.mark.parametrize(("option", "is_all"), [((), True), (("--hash", "sha256"), True), (("--no-hash",), False)])
def test_verify_says_what_was_compared(example: Path, tmp_path: Path, option: tuple[str, ...], is_all: bool) -> None:
    out = tmp_path / "out"
    merged = run("merge", example / "base", example / "adapter", "--alpha", 16, "-o", out, *option)
    assert merged.exit_code == 0, merged.stderr
    verified = run("verify", out)
    assert verified.exit_code == 0
    assert ("not compared" in verified.stdout) != is_all
    against = run("verify", out, "--base", example / "base")
    assert (against.exit_code, "not compared" in against.stdout) == (0, False)


def test_verify_of_a_damaged_file_is_one_page_not_a_list_of_weights(example: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("merge", example / "base", example / "adapter", "--alpha", 16, "-o", out).exit_code == 0
    os.truncate(out / "model.safetensors", (out / "model.safetensors").stat().st_size - 5)
    verified = run("verify", out)
    assert verified.exit_code == 1
    assert verified.stdout.count("error[LF804]") == 3  # its size, its header, what it held
