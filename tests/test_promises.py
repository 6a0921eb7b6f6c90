"""The promises of SECURITY.md about reading, one test or more each, named by their numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hostile import CONFIG, MAKERS, MODULE, archive, factors, make_all, peft, safetensors

from loraformat.cli import main
from loraformat.containers import open_bundle
from loraformat.diagnostics import Severity
from loraformat.errors import ContainerError, StorageError
from loraformat.io import open_adapter
from loraformat.jobs.validate import validate

ROOT = Path(__file__).parent.parent
BAD = sorted((ROOT / "fixtures" / "bad").glob("*/adapter"))
GOOD = sorted(path for path in (ROOT / "fixtures" / "good").glob("*/*") if path.is_dir())
VERBS = ("validate", "inspect")
FORBIDDEN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b-\u200f\u2028\u2029\ufeff\uffff\U000e0000-\U000e007f]"
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_all(tmp_path_factory.mktemp("hostile"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# Runs both verbs on every folder given: once to import what there is to import, then with a hook that ends the process
# at anything that runs code, starts a process or opens a connection.
GUARD = """
import json, os, sys
from click.testing import CliRunner
from loraformat.cli import main
ALWAYS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
          "socket.connect", "socket.getaddrinfo")
armed = False
def hook(event, arguments):
    if event.startswith(ALWAYS) or (armed and event in ("exec", "compile", "import")):
        os.write(2, f"FORBIDDEN {event} {arguments!r}"[:300].encode())
        os._exit(99)
folders = sys.argv[1:]
sys.addaudithook(hook)
for armed in (False, True):
    for folder in folders:
        verbs = (["validate", "--deep", folder, "--format", "json"], ["inspect", folder])
        for arguments in verbs:
            CliRunner().invoke(main, arguments)
print("done")
"""


def guarded(folders: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", GUARD, *map(str, folders)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_p1_nothing_of_a_file_is_executed(hostile: list[Path], tmp_path: Path) -> None:
    cheap = [folder for folder in hostile if folder.parent.name != "sparse_16_gib"]
    done = guarded([*cheap, *BAD], tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-500:]
    assert list(tmp_path.iterdir()) == []
    assert not list(hostile[0].parent.parent.rglob("PWNED"))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # seconds of work, whatever else the machine does
from loraformat.cli import main
main(sys.argv[1:], prog_name="loraformat")
"""


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_p2_there_is_always_an_answer_in_a_gigabyte(maker: object, verb: str, hostile: list[Path]) -> None:
    (folder,) = (each for each in hostile if each.parent.name == maker.__name__)  # type: ignore[attr-defined]
    command = [sys.executable, "-c", LIMITED, verb, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode in (0, 1, 3), done.stderr[-300:]
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 or (done.stdout + done.stderr).strip()


def test_p3_headers_are_read_and_nothing_else(tmp_path: Path) -> None:
    """The data is a hole of 16 GiB; what was read of the file is counted by the kernel."""
    from hostile import sparse_16_gib

    sparse_16_gib(tmp_path)
    for verb in VERBS:
        script = f"import sys; sys.argv[0]; {LIMITED}"
        probe = "import atexit; atexit.register(lambda: print(open('/proc/self/io').read(), file=sys.stderr))"
        command = [sys.executable, "-c", f"import sys; {probe}\n{script}", verb, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"rchar: (\d+)", done.stderr)
        assert found is not None, done.stderr
        assert int(found[1]) < 50_000_000


def test_p4_a_file_that_changes_while_it_is_used_is_an_error(tmp_path: Path) -> None:
    peft(tmp_path)
    adapter = open_adapter(str(tmp_path)).adapter
    (chain,) = adapter.updates.values()
    path = tmp_path / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(StorageError, match="changed while it was in use"):
        chain[0].down.torch()


@pytest.mark.parametrize(
    "text",
    [
        b'{"r": 1, "r": 2}',
        b'{"r": NaN}',
        b'{"r": Infinity}',
        b'{"r": 1e999}',
        b'{"r": ' + b"1" * 30 + b"}",
        b'{"r": ' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"r": "\\ud800"}',
        b'\xef\xbb\xbf{"r": 1}',
        b'{"r": "\xff"}',
        b"{'r': 1}",
        b'{"r": 1} x',
        b'{"r": 1 // no\n}',
        b"{" + b" " * (1 << 20) + b"}",
    ],
)
def test_p5_only_strict_json_is_read(tmp_path: Path, text: bytes) -> None:
    peft(tmp_path, config=text)
    codes = [finding.code for finding in validate(str(tmp_path)).findings if finding.severity is Severity.ERROR]
    assert codes == ["LF005"]


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/hostname", "a/b.safetensors", "..", "", "a\\b"])
def test_p6_an_index_names_no_file_outside_its_folder(tmp_path: Path, shard: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(safetensors({"w": ("F32", [2], 8)}))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    peft(tmp_path)
    result = run("validate", tmp_path, "--base", base)
    assert result.exit_code == 3
    assert "expected a file name without folders" in result.stderr


def test_p6_links_that_leave_the_folder_are_not_followed(hostile: list[Path], tmp_path: Path) -> None:
    (folder,) = (each for each in hostile if each.parent.name == "link_to_a_secret")
    for arguments in (
        ("validate", folder),
        ("inspect", folder),
        ("convert", folder, "--to", "native", "-o", tmp_path / "o"),
    ):
        result = run(*arguments)
        assert "SECRET-4711" not in result.output
    assert not any(b"SECRET-4711" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_p6_what_is_no_regular_file_is_not_opened(hostile: list[Path]) -> None:
    (folder,) = (each for each in hostile if each.parent.name == "fifo_in_the_folder")
    bundle = open_bundle(str(folder))
    assert sorted(bundle.files) == ["adapter_config.json", "adapter_model.safetensors"]


def test_p7_what_a_file_claims_is_never_allocated(tmp_path: Path) -> None:
    """Views larger than their storage, compressed records and tensors without storage are refused by the header."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    size = b"\x8a\x05\x00\x00\x00\x00\x01"  # 2^32
    view = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\x00("
        + size
        + b"t(K\x00t\x89ccollections\nOrderedDict\n)RtR"
    )
    pickle = b"\x80\x02}X\x01\x00\x00\x00a" + view + b"s."
    (tmp_path / "lora_weights.pt").write_bytes(archive(pickle, **{"data/0": bytes(16)}))
    (tmp_path / "lora_config.json").write_text('{"rank": 2, "alpha": 1.0}')
    with pytest.raises(ContainerError):
        open_bundle(str(tmp_path)).tensors("lora_weights.pt")


def test_p8_a_flipped_bit_of_a_record_is_an_error(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fixtures" / "good" / "native" / "tiny-llama-pt", tmp_path / "adapter")
    path = tmp_path / "adapter" / "lora_weights.pt"
    with zipfile.ZipFile(path) as archive_:
        record = next(each for each in archive_.infolist() if "/data/" in each.filename)
    data = bytearray(path.read_bytes())
    name, extra = (int.from_bytes(data[record.header_offset + at :][:2], "little") for at in (26, 28))
    data[record.header_offset + 30 + name + extra + 5] ^= 1
    path.write_bytes(data)
    for arguments in (["validate", "--deep"], ["convert", "--to", "peft", "-o", tmp_path / "out"]):
        verb, *options = arguments
        result = run(verb, tmp_path / "adapter", *options)
        assert result.exit_code in (1, 3)
        assert "CRC" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["validate"], ["validate", "--deep"], ["inspect"], ["inspect", "--norms"]])
@pytest.mark.parametrize("form", ["text", "json"])
def test_p9_nothing_that_a_terminal_acts_on_is_printed(hostile: list[Path], arguments: list[str], form: str) -> None:
    for folder in (each for each in hostile if each.parent.name.endswith("everywhere")):
        result = run(*arguments, folder, "--format", form)
        assert not FORBIDDEN.search(result.stdout + result.stderr)
        assert not re.search(r"::error|##\w*\[", result.stdout + result.stderr)
        assert form == "text" or result.stdout.isascii()


def test_p10_local_paths_open_no_connection(hostile: list[Path], tmp_path: Path) -> None:
    """The hook of P1 ends the process at the first attempt."""
    folders = [each for each in hostile if each.parent.name == "url_as_base"]
    done = guarded([*folders, *GOOD[:3]], tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-500:]


@pytest.mark.parametrize(
    "extra",
    ["x", f"{MODULE}.lora_C.weight", "lora_A.weight", f"{MODULE}.lora_A.default.other", f"{MODULE}.weight.scale"],
)
def test_p11_every_tensor_is_used_or_named(tmp_path: Path, extra: str) -> None:
    names = {f"{MODULE}.lora_A.weight": ("F32", [2, 4], 32), f"{MODULE}.lora_B.weight": ("F32", [4, 2], 32)}
    peft(tmp_path, safetensors({**names, extra: ("F32", [3], 12)}))
    told = [finding for finding in validate(str(tmp_path)).findings if finding.severity >= Severity.WARNING]
    bare = extra.removeprefix("base_model.model.")
    assert any(bare in finding.where + finding.message or extra in finding.message for finding in told), told


@pytest.mark.parametrize("setting", ["r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern"])
def test_p11_a_setting_that_contradicts_the_tensors_is_an_error(tmp_path: Path, setting: str) -> None:
    wrong = {"r": 3, "lora_alpha": "4", "use_rslora": "yes", "use_dora": True, "rank_pattern": {"q_proj": 1}}
    peft(tmp_path, config={setting: wrong[setting]})
    assert not validate(str(tmp_path)).ok


@pytest.mark.parametrize("folder", GOOD, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_p12_what_is_valid_is_accepted(folder: Path) -> None:
    alpha = 16 if folder.name.endswith("no-alpha") else None
    files = [path for path in folder.iterdir() if path.name != "expect.json"]
    subject = files[0] if len(files) == 1 else folder
    report = validate(str(subject), deep=True, alpha=alpha)
    assert report.ok, report.findings


def test_p12_zero_updates_and_nan_in_text_are_no_errors(tmp_path: Path) -> None:
    peft(tmp_path, factors(__metadata__={"loss": "NaN"}), {**CONFIG, "lora_dropout": 0.0})
    assert validate(str(tmp_path), deep=True).ok


def test_every_promise_has_a_test() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    promised = set(re.findall(r"^- \*\*(P\d+)", text, re.MULTILINE))
    tested = {f"P{number}" for number in re.findall(r"def test_p(\d+)_", Path(__file__).read_text(encoding="utf-8"))}
    assert promised == tested == {f"P{number}" for number in range(1, 13)}
