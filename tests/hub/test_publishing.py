"""-o hf://: what a commit holds, what it costs, what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import hub_models
import pytest
from hub_repositories import Hub

import loraformat
from loraformat import Publication
from loraformat.errors import StorageError, UsageError

pytestmark = pytest.mark.usefixtures("nothing_left")
BASE, ADAPTER, OUT = "hf://acme/base", "hf://acme/adapter", "hf://tester/merged"


def local_files(models: Path) -> dict[str, bytes]:
    """What the local merge has, without what is about this machine's copy."""
    left_out = ("README.md", "loraformat.digests.json")
    return {path.name: path.read_bytes() for path in (models / "merged").iterdir() if path.name not in left_out}


def committed(hub: Hub, name: str = "tester/merged", branch: str = "main") -> dict[str, bytes]:
    left_out = ("README.md", "loraformat.digests.json", ".gitattributes")
    return {path: hub.read(name, path, branch) for path in hub.files(name, branch) if path not in left_out}


def uploads(hub: Hub) -> int:
    return sum(row.received for row in hub.taken("^PUT /large"))


def codes(report: loraformat.Report) -> set[str]:
    return {finding.code for finding in report.findings}


def test_a_merge_on_the_hub_is_the_local_merge_in_one_commit(online: Hub, models: Path) -> None:
    report = loraformat.merge(BASE, [ADAPTER], OUT)
    assert committed(online) == local_files(models)
    assert len(online.repositories["tester/merged"].commits) == 2  # the first has .gitattributes alone
    assert len(online.taken("^POST .*/commit/")) == 1
    assert "LF830" in codes(report)
    assert loraformat.verify(OUT).ok


def test_a_file_that_does_not_change_is_copied_by_the_hub_and_never_uploaded(online: Hub, models: Path) -> None:
    loraformat.merge(BASE, [ADAPTER], OUT)
    changed = sum((models / "merged" / name).stat().st_size for name in hub_models.FILES[:2])
    assert uploads(online) == changed
    (asked,) = online.taken("lfs-files/duplicate")
    assert asked.path == "/api/models/acme/base/lfs-files/duplicate"
    assert not any(row.has_token for row in online.log if row.path.startswith("/large/"))


def test_of_a_file_that_does_not_change_the_header_alone_comes_down(online: Hub) -> None:
    """256 KiB behind the part that holds its header."""
    files = {name: online.read("acme/base", name) for name in online.files("acme/base")}
    weights, nbytes = files[hub_models.FILES[2]], 256 << 10
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    end = len(weights) - 8 - size
    header["model.rest.weight"] = {"dtype": "U8", "shape": [nbytes], "data_offsets": [end, end + nbytes]}
    text = json.dumps(header).encode()
    files[hub_models.FILES[2]] = len(text).to_bytes(8, "little") + text + weights[8 + size :] + bytes(nbytes)
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["model.rest.weight"] = hub_models.FILES[2]
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    online.put("acme/base", files)
    since = len(online.log)
    loraformat.merge(BASE, [ADAPTER], OUT)
    stored = online.files("tester/merged")[hub_models.FILES[2]]
    assert stored == online.files("acme/base")[hub_models.FILES[2]]
    assert sum(row.sent for row in online.taken(f"GET /large/{stored.sha256}", since)) <= 128 << 10
    assert "loraformat.digests.json" not in online.files("tester/merged")


def test_in_another_storage_region_the_file_is_uploaded_and_that_is_said(online: Hub, models: Path) -> None:
    online.create("tester/merged", region="eu")
    report = loraformat.merge(BASE, [ADAPTER], OUT)
    (found,) = [finding for finding in report.findings if finding.code == "LF831"]
    assert "another storage region" in found.message
    assert hub_models.FILES[2] in found.message
    assert committed(online) == local_files(models)
    online.repositories["acme/base"].has_xet = False
    again = loraformat.merge(BASE, [ADAPTER], f"{OUT}-2")
    assert "Xet" in next(finding.message for finding in again.findings if finding.code == "LF831")


def test_a_local_base_is_uploaded_whole(online: Hub, models: Path) -> None:
    loraformat.merge(models / "base", [models / "adapter"], OUT)
    files = committed(online)
    assert {**files, "loraformat.digests.json": b""}.keys() == {*local_files(models), "loraformat.digests.json"}
    assert files == local_files(models)
    assert "loraformat.digests.json" in online.files("tester/merged")
    assert loraformat.verify(OUT).ok


def test_a_repository_that_is_not_empty_needs_overwrite(online: Hub, models: Path) -> None:
    online.put("tester/merged", {"notes.txt": b"mine"})
    with pytest.raises(StorageError, match="the repository is not empty"):
        loraformat.merge(BASE, [ADAPTER], OUT)
    assert committed(online) == {"notes.txt": b"mine"}
    report = loraformat.merge(BASE, [ADAPTER], OUT, overwrite=True)
    assert committed(online) == {**local_files(models), "notes.txt": b"mine"}
    assert "notes.txt" in next(finding.message for finding in report.findings if finding.code == "LF833")


def test_what_is_left_of_an_earlier_output_is_removed_and_named(online: Hub) -> None:
    loraformat.merge(BASE, [ADAPTER], OUT)
    report = loraformat.merge(BASE, [ADAPTER], OUT, max_shard_nbytes=1 << 30, overwrite=True)
    assert hub_models.FILES[0] in next(finding.message for finding in report.findings if finding.code == "LF832")
    assert {name for name in online.files("tester/merged") if name.endswith(".safetensors")} == {
        name
        for name in report.data.files
        if name.endswith(".safetensors")  # type: ignore[union-attr]
    }
    assert not set(hub_models.FILES) & online.files("tester/merged").keys()


@pytest.mark.parametrize("stale", ["pytorch_model.bin", "model.safetensors", "pytorch_model.bin.index.json"])
def test_weights_of_others_never_stay_beside_the_output(online: Hub, stale: str) -> None:
    """transformers would load model.safetensors rather than the shards, without a word."""
    online.put("tester/merged", {stale: b"old"})
    with pytest.raises(StorageError, match="would stay next to the new weights"):
        loraformat.merge(BASE, [ADAPTER], OUT, overwrite=True)
    assert uploads(online) == 0
    assert committed(online) == {stale: b"old"}


@pytest.mark.parametrize("out", [BASE, "hf://ACME/Base", f"{BASE}@main", f"{BASE}/sub", ADAPTER])
def test_an_input_is_never_the_output(online: Hub, out: str) -> None:
    before = {name: dict(one.refs) for name, one in online.repositories.items()}
    with pytest.raises(StorageError, match=r"is, contains, or lies inside the input"):
        loraformat.merge(BASE, [ADAPTER], out, overwrite=True)
    assert {name: dict(one.refs) for name, one in online.repositories.items()} == before


def test_an_input_by_its_commit_or_tag_is_not_replaced(online: Hub) -> None:
    base = online.repositories["acme/base"]
    commit = base.refs["main"]
    base.refs["v1"] = commit
    for revision in (commit, "v1"):
        with pytest.raises(StorageError, match=r"may replace the input hf://acme/base@") as raised:
            loraformat.merge(f"{BASE}@{revision}", [ADAPTER], BASE, overwrite=True)
        assert f"{BASE}: " in str(raised.value)
    assert base.refs["main"] == commit
    loraformat.merge(f"{BASE}@{commit}", [ADAPTER], f"{BASE}@merged", overwrite=True)
    assert base.refs["main"] == commit
    assert "loraformat.manifest.json" in online.files("acme/base", "merged")


def test_a_pull_request_is_not_called_a_commit(online: Hub) -> None:
    with pytest.raises(StorageError, match="refs/pr/1 cannot be written to"):
        loraformat.merge(BASE, [ADAPTER], f"{OUT}@refs/pr/1")


def test_another_branch_of_the_bases_repository_copies_inside_it(online: Hub, models: Path) -> None:
    online.tokens["x"] = "write"
    loraformat.merge(BASE, [ADAPTER], f"{BASE}@merged", overwrite=True)
    assert committed(online, "acme/base", "merged") == local_files(models)
    assert committed(online, "acme/base", "main").keys() >= set(hub_models.FILES)
    assert not online.taken("duplicate")
    assert online.repositories["acme/base"].refs["main"] != online.repositories["acme/base"].refs["merged"]


def test_a_folder_of_a_repository(online: Hub, models: Path) -> None:
    online.put("tester/adapters", {"one/adapter_model.safetensors": b"other"})
    loraformat.convert(ADAPTER, "hf://tester/adapters/two", to="native")
    files = online.files("tester/adapters")
    assert "two/lora_weights.safetensors" in files
    assert online.read("tester/adapters", "one/adapter_model.safetensors") == b"other"
    assert (
        loraformat.load_adapter("hf://tester/adapters/two").updates.keys()
        == loraformat.load_adapter(models / "adapter").updates.keys()
    )


def test_a_private_repository_and_a_message(online: Hub) -> None:
    options = Publication(private=True, commit_message="v2", card=False)
    loraformat.merge(BASE, [ADAPTER], OUT, publication=options)
    repository = online.repositories["tester/merged"]
    assert repository.is_private
    assert repository.messages[repository.refs["main"]] == "v2"
    assert online.read("tester/merged", "README.md").decode() == hub_models.CARD  # as a local merge copies it


def test_private_is_never_ignored(online: Hub) -> None:
    """What was meant to be private would be public."""
    online.create("tester/merged")
    with pytest.raises(StorageError, match="the repository exists and is public"):
        loraformat.merge(BASE, [ADAPTER], OUT, publication=Publication(private=True))
    online.create("tester/hidden", is_private=True)
    loraformat.merge(BASE, [ADAPTER], "hf://tester/hidden", publication=Publication(private=True))
    assert hub_models.FILES[0] in online.files("tester/hidden")


def test_a_pull_request_leaves_the_branch_alone(online: Hub, models: Path) -> None:
    online.create("tester/merged")
    before = online.repositories["tester/merged"].refs["main"]
    report = loraformat.merge(BASE, [ADAPTER], OUT, publication=Publication(create_pr=True))
    assert online.repositories["tester/merged"].refs["main"] == before
    (branch,) = [name for name in online.repositories["tester/merged"].refs if name.startswith("refs/pr/")]
    assert committed(online, branch=branch) == local_files(models)
    assert "discussions" in next(finding.message for finding in report.findings if finding.code == "LF830")
    with pytest.raises(StorageError, match="no repository to open a pull request in"):
        loraformat.merge(BASE, [ADAPTER], "hf://tester/none", publication=Publication(create_pr=True))
    assert "tester/none" not in online.repositories


def test_every_verb_that_writes_an_adapter(online: Hub, models: Path) -> None:
    adapter = models / "adapter"
    loraformat.scale(adapter, "hf://tester/scale", weight=0.5)
    loraformat.resize(adapter, "hf://tester/resize", rank=1)
    loraformat.pick(adapter, "hf://tester/pick", select=["q_proj"])
    loraformat.combine([adapter, adapter], "hf://tester/combine")
    loraformat.convert(adapter, "hf://tester/convert", to="native", check_roundtrip=True)
    loraformat.stamp(adapter, BASE, "hf://tester/stamp")
    loraformat.init(BASE, "hf://tester/init", rank=2, target=["q_proj"])
    loraformat.extract(BASE, models / "merged", "hf://tester/extract", rank=2)
    for verb in ("scale", "resize", "pick", "combine", "convert", "stamp", "init", "extract"):
        found = loraformat.validate(f"hf://tester/{verb}", base=models / "base")
        assert found.ok, (verb, found.findings)
        assert not {finding.code for finding in found.findings} & {"LF502", "LF507", "LF512"}, verb
        assert len(online.repositories[f"tester/{verb}"].commits) == 2, verb


def test_without_a_card_that_of_a_person_stays(online: Hub) -> None:
    online.put("tester/merged", {"README.md": b"mine"})
    loraformat.merge(BASE, [ADAPTER], OUT, overwrite=True, publication=Publication(card=False))
    assert online.read("tester/merged", "README.md") == b"mine"


def test_every_verb_that_writes_a_model(online: Hub, models: Path) -> None:
    loraformat.merge(BASE, [ADAPTER], OUT)
    loraformat.unmerge(OUT, [ADAPTER], "hf://tester/base-again", base=BASE)
    assert {name: online.read("tester/base-again", name) for name in hub_models.FILES} == {
        name: (models / "base" / name).read_bytes() for name in hub_models.FILES
    }
    assert uploads(online) == sum((models / "merged" / name).stat().st_size for name in hub_models.FILES[:2])
    loraformat.dequantize(Path(__file__).parents[2] / "fixtures" / "quantized" / "nf4", "hf://tester/dense")
    assert "quantization_config" not in json.loads(online.read("tester/dense", "config.json"))


def test_what_does_not_go_together_is_a_usage_error(online: Hub, models: Path, tmp_path: Path) -> None:
    for options in (Publication(private=True), Publication(create_pr=True), Publication(card=False)):
        with pytest.raises(UsageError, match="only for outputs on the Hub"):
            loraformat.merge(models / "base", [models / "adapter"], tmp_path / "out", publication=options)
    with pytest.raises(UsageError, match="cannot be continued"):
        loraformat.merge(BASE, [ADAPTER], OUT, resume=True)
    with pytest.raises(UsageError, match="pull requests to the main branch only"):
        loraformat.merge(BASE, [ADAPTER], f"{OUT}@v2", publication=Publication(create_pr=True))
    with pytest.raises(UsageError, match="pull requests to the main branch only"):
        loraformat.merge(BASE, [ADAPTER], f"{OUT}@v2", publication=Publication(create_pr=True), dry_run=True)
    with pytest.raises(UsageError, match="expected a message"):
        loraformat.merge(BASE, [ADAPTER], OUT, publication=Publication(commit_message=" "))
    with pytest.raises(StorageError, match="a commit cannot be written to"):
        loraformat.merge(BASE, [ADAPTER], f"{OUT}@{'0' * 40}")
    assert not (tmp_path / "out").exists()
    assert "tester/merged" not in online.repositories


def test_nothing_is_written_offline(online: Hub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="offline"):
        loraformat.merge(models / "base", [models / "adapter"], OUT)
    assert not online.log


def test_a_file_of_a_repository_and_its_cache(online: Hub, models: Path, tmp_path: Path) -> None:
    from loraformat.storage import open_store

    store = open_store(f"{BASE}/{hub_models.FILES[0]}")
    assert store.is_single_file
    assert list(store.files()) == [hub_models.FILES[0]]
    commit = online.repositories["acme/base"].refs["main"]
    snapshot = tmp_path / "cache" / "models--acme--base" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / hub_models.FILES[0]).write_bytes((models / "base" / hub_models.FILES[0]).read_bytes())
    (snapshot / hub_models.FILES[1]).write_bytes(b"cut short")
    online.log.clear()
    again = open_store(BASE)
    for name in hub_models.FILES[:2]:
        assert again.read(name) == (models / "base" / name).read_bytes()
    assert not online.taken(f"resolve/.*{hub_models.FILES[0]}")
    assert online.taken(f"resolve/.*{hub_models.FILES[1]}")


@pytest.mark.parametrize("option", [["--private"], ["--create-pr"], ["--no-card"], ["--commit-message", "x"]])
@pytest.mark.parametrize("verb", ["merge", "dequantize", "pick", "convert", "stamp"])
def test_options_of_the_hub_with_a_local_output_exit_with_2(
    online: Hub, models: Path, tmp_path: Path, verb: str, option: list[str]
) -> None:
    from click.testing import CliRunner

    from loraformat.cli import main

    base, adapter = str(models / "base"), str(models / "adapter")
    arguments = {
        "merge": [base, adapter],
        "dequantize": [base],
        "pick": [adapter, "--select", "q_proj"],
        "convert": [adapter, "--to", "native"],
        "stamp": [adapter, "--base", base],
    }[verb]
    done = CliRunner().invoke(main, [verb, *arguments, "-o", str(tmp_path / "out"), *option])
    assert done.exit_code == 2, done.output
    assert option[0] in done.output
    assert not (tmp_path / "out").exists()


def test_the_command_line_publishes(online: Hub, models: Path) -> None:
    from click.testing import CliRunner

    from loraformat.cli import main

    options = ["--private", "--no-card", "--commit-message", "v3"]
    done = CliRunner().invoke(main, ["merge", BASE, ADAPTER, "-o", OUT, *options])
    assert done.exit_code == 0, done.output
    repository = online.repositories["tester/merged"]
    assert repository.is_private
    assert repository.messages[repository.refs["main"]] == "v3"
    assert "LF830" in done.output
    stamped = CliRunner().invoke(main, ["stamp", str(models / "adapter"), "--base", BASE, "-o", "hf://tester/stamped"])
    assert stamped.exit_code == 0, stamped.output
    assert "base_model_relation: adapter" in online.read("tester/stamped", "README.md").decode()


@pytest.mark.parametrize("token", ["hf_SECR\u00c9T", "hf_SECRET SECRET"])
def test_a_token_that_no_header_can_hold(online: Hub, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(StorageError, match="spaces or characters that are not printable ASCII") as raised:
        loraformat.inspect(BASE)
    assert "SECR" not in str(raised.value)
    assert not online.log
