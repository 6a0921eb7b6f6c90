"""The library takes path objects wherever it takes paths, and no bare text where it takes several."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import loraformat
from loraformat.errors import StorageError, UsageError
from loraformat.jobs.diff import diff
from loraformat.jobs.estimate import estimate
from loraformat.jobs.plot import plot
from loraformat.jobs.verify import verify
from loraformat.storage import uri_of

FIXTURES = Path(__file__).parent.parent / "fixtures"
ADAPTER = FIXTURES / "minigpt" / "lora_adapter"
BASE = FIXTURES / "minigpt" / "base"
GOOD = FIXTURES / "good" / "peft" / "tiny-llama"


def test_path_objects_are_taken_from_end_to_end(tmp_path: Path) -> None:
    adapter = loraformat.load_adapter(ADAPTER, alpha=1.0)
    loraformat.save_adapter(adapter, tmp_path / "saved", to="peft", inputs=[ADAPTER])
    peft, merged = tmp_path / "peft", tmp_path / "merged"
    reports = [
        loraformat.inspect(ADAPTER, base=BASE, alpha=1.0),
        loraformat.validate(ADAPTER, base=BASE, alpha=1.0),
        loraformat.convert(ADAPTER, peft, to="peft", base=BASE, alpha=1.0),
        loraformat.merge(BASE, [peft], merged),
        verify(merged, base=BASE),
        diff(tmp_path / "saved", peft),
        plot([peft], tmp_path / "page.html", base=BASE),
        estimate(BASE, rank=4, targets=["q_proj"]),
    ]
    assert all(report.ok for report in reports)
    assert [report.subject for report in reports] == [
        *map(str, (ADAPTER, ADAPTER, ADAPTER, BASE, merged, tmp_path / "saved", peft, BASE))
    ]
    assert all(isinstance(path, str) for report in reports for path in report.written)


@pytest.mark.parametrize("one", [str(GOOD), GOOD, b"adapter"])
def test_one_adapter_alone_is_not_a_list_of_adapters(one: Any, tmp_path: Path) -> None:
    """Text is a sequence of its letters, each of which would be taken for an adapter."""
    with pytest.raises(UsageError, match="expected a list of paths"):
        loraformat.merge(BASE, one, tmp_path / "out")
    with pytest.raises(UsageError, match="expected a list of paths"):
        plot(one, tmp_path / "page.html")


@pytest.mark.parametrize("option", ["select", "ignore", "target"])
def test_one_word_alone_is_not_a_list_of_words(option: str) -> None:
    with pytest.raises(UsageError, match=r'expected a list of .*, found "vllm" alone \(write \["vllm"\]\)'):
        loraformat.validate(GOOD, **{option: "vllm"})


def test_one_target_alone_is_not_a_list_of_targets() -> None:
    with pytest.raises(UsageError, match='write \\["all-linear"\\]'):
        estimate(BASE, rank=4, targets="all-linear")


@pytest.mark.parametrize("value", [3, None, b"adapter", ["adapter"]])
def test_what_is_not_a_path_is_named_by_its_type(value: Any) -> None:
    with pytest.raises(UsageError, match=f"found {type(value).__name__}"):
        loraformat.inspect(value)


def test_an_address_of_the_hub_that_pathlib_has_joined_is_named() -> None:
    with pytest.raises(UsageError, match='pass "hf://owner/name"'):
        loraformat.inspect(Path("hf://owner/name"))


@pytest.mark.parametrize("several", [{str(GOOD): 0.5}, {str(GOOD)}, 3])
def test_adapters_without_an_order_are_refused_before_a_strength_is_lost(several: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'expected a list of paths, found \w+ \(.*"PATH=0.7" for'):
        loraformat.merge(BASE, several, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [
        {"dtype": "fp16"},
        {"dtype": 3},
        {"container": "pickle"},
        {"rounding": "up"},
        {"verify": "all"},
        {"digests": "md5"},
    ],
)
def test_a_value_that_an_argument_does_not_have_is_refused(option: dict[str, Any], tmp_path: Path) -> None:
    """Nothing else would: a dtype that is not known would be taken for none at all."""
    with pytest.raises(UsageError, match=f"{next(iter(option))}: expected one of "):
        loraformat.merge(BASE, [GOOD], tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_what_is_saved_is_an_adapter_in_a_container_that_exists(tmp_path: Path) -> None:
    path: Any = GOOD
    with pytest.raises(UsageError, match=r"expected an Adapter, found \w+ \(make one with load_adapter"):
        loraformat.save_adapter(path, tmp_path / "out", to="native")
    with pytest.raises(UsageError, match="container: expected one of gguf, safetensors, torch, found pickle"):
        loraformat.save_adapter(loraformat.load_adapter(GOOD), tmp_path / "out", to="native", container="pickle")
    for name, text in (
        ("ggml", r"no format \"ggml\" \(did you mean gguf"),
        ("tinker", "does not write it \\(writable"),
    ):
        with pytest.raises(UsageError, match=text):
            loraformat.save_adapter(loraformat.load_adapter(GOOD), tmp_path / "out", to=name)
    assert not (tmp_path / "out").exists()


def test_an_alpha_is_a_number() -> None:
    text: Any = "16"
    with pytest.raises(UsageError, match="alpha: expected a finite number, found 16"):
        loraformat.load_adapter(ADAPTER, alpha=text)


def test_file_addresses_are_paths(tmp_path: Path) -> None:
    address = f"file://{BASE}"
    assert loraformat.open_checkpoint(address).tensors.keys() == loraformat.open_checkpoint(BASE).tensors.keys()
    (tmp_path / "a b").mkdir()
    assert uri_of(f"file://localhost{tmp_path}/a%20b") == f"{tmp_path}/a b"
    with pytest.raises(UsageError, match="another machine"):
        uri_of("file://elsewhere/models")


@pytest.mark.parametrize("spelled", ["{0}", "{0}/", "file://{0}", "{0}/../base", "{0}/inner"])
def test_an_output_is_not_its_input_however_that_is_spelled(spelled: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(StorageError, match="lies inside the input"):
        loraformat.merge(f"file://{base}", [ADAPTER], spelled.format(base), alpha=1.0, overwrite=True)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize(
    "address",
    [
        "https://b.s3.amazonaws.com/k?X-Amz-Signature=SECRET",
        "https://hf_SECRET@huggingface.co/a/b",
        "hf://hf_SECRET@owner/name",
        "hf:/hf_SECRET@owner/name",
        "s3n://bucket/x?AWSAccessKeyId=SECRET&Signature=SECRET",
        "s3:/AKIA:SECRET@b/p",
        "s3:/AKIA:SEC/SECRET@b/p",
        "az://c/x?sv=1&sig=SECRET",
        "https://host/x?y=SECRET",
        "ftp://SECRET@host/x",
    ],
)
def test_no_error_repeats_what_may_be_secret(address: str) -> None:
    for call in (loraformat.inspect, lambda out: loraformat.merge(BASE, [ADAPTER], out, alpha=1.0)):
        with pytest.raises((StorageError, UsageError)) as raised:
            call(address)
        assert "SECRET" not in str(raised.value)


@pytest.mark.parametrize(
    "address", ["hf://owner/name@v1/folder", "abfss://box@account.dfs.core.windows.net/x", "a@b:c"]
)
def test_an_at_sign_is_not_a_secret_by_itself(address: str) -> None:
    assert uri_of(address) == address


def test_where_outputs_are_not_written_it_says_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="write to a folder, s3:// or hf://"):
        loraformat.merge(BASE, [ADAPTER], "gs://b/o1", alpha=1.0)
    with pytest.raises(UsageError, match="to a local file"):
        loraformat.card(GOOD, "s3://bucket/README.md")
