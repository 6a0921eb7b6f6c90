"""-o hf:// when something goes wrong: mended, or one error and nothing half visible."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import hub_models
import pytest
from hub_repositories import TOKEN, Hub

import loraformat
from loraformat import Publication
from loraformat.errors import LoraFormatError, StorageError

pytestmark = pytest.mark.usefixtures("nothing_left")
BASE, ADAPTER, OUT = "hf://acme/base", "hf://acme/adapter", "hf://tester/merged"
NOW = {"Retry-After": "0"}


def is_whole(hub: Hub, models: Path, name: str = "tester/merged") -> bool:
    files = hub.files(name)
    return all(hub.read(name, file) == (models / "merged" / file).read_bytes() for file in hub_models.FILES) and (
        "loraformat.manifest.json" in files
    )


def refused(hub: Hub, *words: str, error: type[LoraFormatError] = StorageError) -> str:
    """What a merge that fails says; nothing of it is on the Hub, and the token is not in it."""
    with pytest.raises(error) as raised:
        loraformat.merge(BASE, [ADAPTER], OUT, overwrite=True)
    text = str(raised.value)
    assert "tester/merged" in text
    assert TOKEN not in text
    for word in words:
        assert word in text
    assert "tester/merged" not in hub.repositories or not [
        name for name in hub.files("tester/merged") if name not in (".gitattributes", "theirs.txt")
    ]
    return text


STEPS = ("whoami", "preupload", "objects/batch", "/large/", "repos/create", "duplicate", "/commit/")


@pytest.mark.parametrize(("path", "code"), [*((step, 429) for step in STEPS), ("/commit/", 503), ("/large/", 500)])
def test_a_storm_passes(online: Hub, models: Path, path: str, code: int) -> None:
    online.fault("status", path, times=3, code=code, headers=NOW, method="POST|PUT|GET")
    loraformat.merge(BASE, [ADAPTER], OUT)
    assert is_whole(online, models)
    assert len(online.repositories["tester/merged"].commits) == 2


@pytest.mark.parametrize("path", ["preupload", "/large/", "duplicate", "paths-info"])
def test_a_connection_that_is_reset_is_made_again(online: Hub, models: Path, path: str) -> None:
    online.fault("reset", path, method="POST|PUT")
    loraformat.merge(BASE, [ADAPTER], OUT)
    assert is_whole(online, models)


def test_answers_that_are_cut_are_asked_for_again(online: Hub, models: Path) -> None:
    online.fault("cut", "/large/", times=2, method="GET")
    online.fault("cut", "/acme/base/resolve/", method="GET")
    loraformat.merge(BASE, [ADAPTER], OUT)
    assert is_whole(online, models)


def test_a_page_of_a_proxy_in_the_place_of_an_answer_is_asked_for_again(online: Hub, models: Path) -> None:
    online.fault("status", "validate-yaml", code=502, body=b"<html>bad gateway</html>", headers=NOW)
    loraformat.merge(BASE, [ADAPTER], OUT)
    assert is_whole(online, models)


def test_ranks_to_the_hub_are_refused_by_name(online: Hub) -> None:
    from loraformat.storage import join, stage

    with pytest.raises(StorageError, match="hf upload"), join(OUT, "0a", overwrite=False):
        pass
    with pytest.raises(StorageError, match="hf upload"), stage(OUT, overwrite=False, word="0a"):
        pass
    assert not online.log


def test_a_storm_that_does_not_pass_is_one_error(online: Hub) -> None:
    online.fault("status", "/commit/", times=10**6, code=429, headers=NOW)
    refused(online, "busy", "429")
    assert "tester/merged" not in online.repositories  # made for this, and removed again


def test_a_wait_of_hours_is_an_error_at_once(online: Hub) -> None:
    online.fault("status", "/commit/", times=10**6, code=429, headers={"Retry-After": "7200"})
    refused(online, "7200 s")


def test_an_upload_that_fails_for_good_commits_nothing(online: Hub) -> None:
    online.fault("status", "/large/", times=10**6, code=403, method="PUT")
    refused(online)
    assert not online.taken("/commit/")
    assert "tester/merged" not in online.repositories


def test_a_quota_is_told_in_the_hubs_words(online: Hub) -> None:
    said = b'{"error": "Private repository storage limit reached, please upgrade"}'
    online.fault("status", "/commit/", times=10**6, code=403, body=said)
    refused(online, "quota", "storage limit reached")
    assert "tester/merged" not in online.repositories


def test_an_expired_token_is_known_before_anything_is_written(online: Hub, models: Path) -> None:
    online.tokens.clear()
    with pytest.raises(StorageError, match=r"hf://tester/merged: the Hub rejected the access token.*expired"):
        loraformat.merge(models / "base", [models / "adapter"], OUT)
    assert not online.taken("PUT|commit|create")


def test_without_a_token(online: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refused(online, "needs an access token", "hf auth login")


def test_a_token_that_may_only_read(online: Hub) -> None:
    online.tokens[TOKEN] = "read"
    refused(online, "is read-only")
    online.tokens[TOKEN] = "fineGrained"  # which says nothing of this repository: only the Hub knows
    online.create("tester/merged")
    refused(online, "write access")
    assert not online.taken("PUT")


def test_somebody_elses_repository(online: Hub) -> None:
    for owner in ("nobody", "readers"):
        with pytest.raises(StorageError, match=f"the token may not create one for {owner}"):
            loraformat.merge(BASE, [ADAPTER], f"hf://{owner}/merged")


def test_a_branch_that_moves_meanwhile_is_an_error_and_keeps_what_came(online: Hub) -> None:
    online.create("tester/merged")

    def race(hub: Hub) -> None:
        hub.put("tester/merged", {"theirs.txt": b"theirs"})

    online.fault("call", "/commit/", call=race)
    refused(online, "has moved")
    assert online.read("tester/merged", "theirs.txt") == b"theirs"


def test_a_repository_that_somebody_makes_and_fills_meanwhile_is_not_removed(online: Hub) -> None:
    def race(hub: Hub) -> None:
        hub.put("tester/merged", {"theirs.txt": b"theirs"})

    online.fault("call", "/commit/", call=race)
    refused(online, "has moved")
    assert online.read("tester/merged", "theirs.txt") == b"theirs"

    def made(hub: Hub) -> None:
        hub.create("tester/other")

    online.fault("call", "repos/create", call=made)
    with pytest.raises(StorageError, match="conflict"):
        loraformat.merge(BASE, [ADAPTER], "hf://tester/other")
    assert "tester/other" in online.repositories


def test_a_commit_whose_answer_is_lost_is_found(online: Hub, models: Path) -> None:
    online.fault("lost", "/commit/")
    report = loraformat.merge(BASE, [ADAPTER], OUT)
    assert is_whole(online, models)
    assert len(online.repositories["tester/merged"].commits) == 2
    head = online.repositories["tester/merged"].refs["main"]
    assert head in next(finding.message for finding in report.findings if finding.code == "LF830")


def test_a_pull_request_is_never_opened_twice(online: Hub) -> None:
    online.create("tester/merged")
    online.fault("lost", "/commit/")
    with pytest.raises(StorageError):
        loraformat.merge(BASE, [ADAPTER], OUT, publication=Publication(create_pr=True))
    assert len([name for name in online.repositories["tester/merged"].refs if name.startswith("refs/pr/")]) == 1


def test_a_file_that_the_repository_ignores_is_an_error(online: Hub) -> None:
    online.create("tester/merged", ignored="config.json")
    refused(online, ".gitignore", "config.json")


def test_a_branch_that_was_made_for_it_is_removed_again(online: Hub) -> None:
    online.create("tester/merged")
    online.fault("status", "/commit/", times=10**6, code=403)
    with pytest.raises(StorageError):
        loraformat.merge(BASE, [ADAPTER], f"{OUT}@v2")
    assert list(online.repositories["tester/merged"].refs) == ["main"]


def test_what_is_copied_has_the_bytes_that_the_hub_says(online: Hub) -> None:
    """The listed SHA-256 of the third file is that of other bytes, which the Hub would copy."""
    files = dict(online.files("acme/base"))
    other = online.store(b"other bytes" + bytes(files[hub_models.FILES[2]].nbytes - 11), hub_models.FILES[2])
    served = online.blobs[files[hub_models.FILES[2]].sha256]
    files[hub_models.FILES[2]] = other
    online.commit("acme/base", "main", files)
    online.blobs[other.sha256] = served
    with pytest.raises(StorageError, match="do not have the SHA-256 that the Hub lists"):
        loraformat.merge(BASE, [ADAPTER], OUT, digests="sha256")
    assert "tester/merged" not in online.repositories


def test_a_branch_that_cannot_be_made_leaves_no_repository(online: Hub) -> None:
    online.fault("status", "/branch/", times=10**6, code=403)
    with pytest.raises(StorageError, match="tester/merged@v2"):
        loraformat.merge(BASE, [ADAPTER], f"{OUT}@v2")
    assert "tester/merged" not in online.repositories


def test_no_room_for_the_files_that_wait(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraformat.storage.platform import platform

    monkeypatch.setattr(type(platform()), "free_nbytes", lambda self, folder: 10)
    text = refused(online, "where the files wait for the commit", "TMPDIR")
    needed = sum(online.files("acme/base")[name].nbytes for name in hub_models.FILES[:2])
    assert int(text.partition("no space: ")[2].split()[0]) <= needed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"is_private": True}, ("hf auth login", "HF_TOKEN")),
        ({"gated": True}, ("accept its terms", "acme/base")),
    ],
)
def test_what_may_not_be_read_says_what_to_do(
    online: Hub, monkeypatch: pytest.MonkeyPatch, settings: dict[str, bool], words: tuple[str, ...]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if settings.pop("gated", False):
        online.fault("status", "acme/base", times=10**6, code=401, headers={"X-Error-Code": "GatedRepo"})
    for name, value in settings.items():
        setattr(online.repositories["acme/base"], name, value)
    with pytest.raises(StorageError) as raised:
        loraformat.open_checkpoint(BASE)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_files_go_up_leaves_nothing(
    hub: Hub, models: Path, tmp_path: Path, number: signal.Signals, nothing_left: None
) -> None:
    waiting = hub.fault("wait", "/large/", times=10**6, method="PUT")
    temporary = tmp_path / "temporary"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment = {**kept, **hub.environment(), "HF_HOME": str(tmp_path / "home"), "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "loraformat", "merge", BASE, ADAPTER, "-o", OUT]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert waiting.reached.wait(60)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number)
    assert "no partial output is left" in errors
    assert TOKEN not in errors
    assert not hub.taken("/commit/")
    assert "tester/merged" not in hub.repositories
    assert list(temporary.iterdir()) == []
