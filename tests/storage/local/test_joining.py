"""join: several processes write one unfinished output; stage with its word finishes it; nobody else can meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import stat
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from loraformat.errors import StorageError
from loraformat.storage import MARKER, join, open_output, stage

WORD = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4


def put(target: Path, name: str, text: str, word: str = WORD) -> None:
    with join(str(target), word, overwrite=False, names={"a", "b"}) as store, store.create(name) as writer:
        writer.write(text.encode())


def finish(target: Path, word: str = WORD) -> None:
    with stage(str(target), overwrite=False, names={"a", "b"}, word=word):
        pass


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def unfinished(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".partial"))


def test_what_several_runs_wrote_appears_when_it_is_finished(tmp_path: Path) -> None:
    put(tmp_path / "out", "a", "one")
    put(tmp_path / "out", "b", "two")
    assert unfinished(tmp_path) == [".out.loraformat-0123456789abcdef.partial"]
    assert not (tmp_path / "out").exists()
    finish(tmp_path / "out")
    assert content(tmp_path / "out") == {"a": "one", "b": "two"}
    assert os.listdir(tmp_path) == ["out"]


def _start_together(target: str, barrier: object, name: str, answers: Connection) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    with join(target, WORD, overwrite=False) as store:
        with store.create(name) as writer:
            writer.write(name.encode())
        answers.send(store.location)
        barrier.wait()  # type: ignore[attr-defined]


def test_processes_that_start_at_the_same_moment_get_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, pipes = context.Barrier(4), [context.Pipe() for _ in range(4)]
    running = [
        context.Process(target=_start_together, args=(str(tmp_path / "out"), barrier, f"f{n}", pipes[n][1]))
        for n in range(4)
    ]
    for process in running:
        process.start()
    places = {pipe.recv() for pipe, _ in pipes if pipe.poll(120)}
    for process in running:
        process.join()
    assert len(places) == 1
    assert [process.exitcode for process in running] == [0] * 4
    finish(tmp_path / "out")
    assert content(tmp_path / "out") == {f"f{n}": f"f{n}" for n in range(4)}
    assert os.listdir(tmp_path) == ["out"]


def test_while_one_writes_only_its_like_may(tmp_path: Path) -> None:
    with join(str(tmp_path / "out"), WORD, overwrite=False):
        put(tmp_path / "out", "a", "beside it")
        for word in (None, WORD):
            with (
                pytest.raises(StorageError, match=f"in use by pid {os.getpid()}"),
                stage(str(tmp_path / "out"), overwrite=False, word=word),
            ):
                raise AssertionError("unreachable")
    finish(tmp_path / "out")
    assert content(tmp_path / "out") == {"a": "beside it"}


def test_a_run_of_its_own_keeps_others_out(tmp_path: Path) -> None:
    with stage(str(tmp_path / "out"), overwrite=False), pytest.raises(StorageError, match="in use by pid"):
        put(tmp_path / "out", "a", "x")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_keeps_what_is_there(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted(word: str | None) -> None:
        put(tmp_path / "out", "a", "x")
        if word is None:
            with join(str(tmp_path / "out"), WORD, overwrite=False) as store, store.create("b"):
                raise error
        with stage(str(tmp_path / "out"), overwrite=False, word=word) as store, store.create("b"):
            raise error

    for word in (None, WORD):
        with pytest.raises(error):
            interrupted(word)
        (left,) = unfinished(tmp_path)
        assert sorted(os.listdir(tmp_path / left)) == [MARKER, "a"]
    finish(tmp_path / "out")
    assert content(tmp_path / "out") == {"a": "x"}


def test_another_run_sweeps_it(tmp_path: Path) -> None:
    put(tmp_path / "out", "a", "x")
    cleared: list[int] = []
    with stage(str(tmp_path / "out"), overwrite=False, on_cleared=cleared.append):
        assert len(unfinished(tmp_path)) == 2  # the lock, and what this run makes
    assert len(cleared) == 1
    assert content(tmp_path / "out") == {}
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_that_resumes_is_not_given_it(tmp_path: Path) -> None:
    put(tmp_path / "out", "a", "x")
    with stage(str(tmp_path / "out"), overwrite=False, resume=True) as store:
        assert store.files() == {}


def test_finishing_sweeps_what_other_words_left(tmp_path: Path) -> None:
    put(tmp_path / "out", "a", "mine")
    put(tmp_path / "out", "a", "theirs", OTHER)
    assert len(unfinished(tmp_path)) == 2
    finish(tmp_path / "out")
    assert content(tmp_path / "out") == {"a": "mine"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_word_that_nobody_joined_cannot_be_finished(tmp_path: Path) -> None:
    put(tmp_path / "out", "a", "theirs", OTHER)
    with pytest.raises(StorageError, match="no rank of this run has written anything there"):
        finish(tmp_path / "out")
    assert unfinished(tmp_path) == [".out.loraformat-fedcba9876543210.partial"]


def test_what_stands_at_the_target_is_refused_as_by_stage(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        put(tmp_path / "out", "a", "x")
    with (
        pytest.raises(StorageError, match="input"),
        join(str(tmp_path / "out"), WORD, overwrite=True, inputs=[str(tmp_path)]),
    ):
        raise AssertionError("unreachable")
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.loraformat-0123456789abcdef.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="another user"):
        put(tmp_path / "out", "a", "x")
    with pytest.raises(StorageError, match="no rank"):
        finish(tmp_path / "out")
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_folder_of_another_output_is_not_taken(tmp_path: Path) -> None:
    put(tmp_path / "out", "a", "x")
    (tmp_path / ".out.loraformat-0123456789abcdef.partial" / MARKER).write_text("other")
    with pytest.raises(StorageError, match="another name"):
        put(tmp_path / "out", "a", "x")
    with pytest.raises(StorageError, match="no rank"):
        finish(tmp_path / "out")


def test_its_files_are_as_private_as_stage_makes_them(tmp_path: Path) -> None:
    with join(str(tmp_path / "out"), WORD, overwrite=False, permissions=0o700) as store:
        with open_output(store.location, store.permissions).create("a") as writer:
            writer.write(b"x")
        assert stat.S_IMODE(os.stat(store.location).st_mode) & 0o077 == 0
        assert stat.S_IMODE((Path(store.location) / "a").stat().st_mode) & 0o077 == 0


def test_a_file_that_is_being_written_is_not_there_yet(tmp_path: Path) -> None:
    with join(str(tmp_path / "out"), WORD, overwrite=False) as store:
        folder = Path(store.location)
        with store.create("a") as writer:
            writer.write(b"half")
            assert "a" not in os.listdir(folder)
        with store.subfolder("inner") as inner, inner.create("b") as writer:
            writer.write(b"half")
            assert "b" not in os.listdir(folder / "inner")


def test_a_word_is_hexadecimal(tmp_path: Path) -> None:
    for word in ("", "../../../../etc/x", "0123456789ABCDEF", "0123"):
        with pytest.raises(ValueError), join(str(tmp_path / "out"), word, overwrite=False):
            raise AssertionError("unreachable")
    assert os.listdir(tmp_path) == []
