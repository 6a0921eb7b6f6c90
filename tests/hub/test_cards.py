"""Model cards: what huggingface_hub makes of them, what they keep, and what cannot break out of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_repositories import Hub
from huggingface_hub import ModelCard

import loraformat
from loraformat.errors import ConfigError, FormatError, InvalidYaml, LoraFormatError, StorageError, UsageError

FIXTURES = Path(__file__).parents[2] / "fixtures"
GOOD = FIXTURES / "good"


def text_of(report: loraformat.Report) -> str:
    assert isinstance(report.data, loraformat.CardResult)
    return report.data.text


def parsed(text: str) -> dict[str, Any]:
    """The front matter as the Hub's own tools read it, and write it again."""
    data = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    assert isinstance(data, dict)
    return data


def merged(models: Path, folder: Path) -> Path:
    return models / "merged"


def dequantized(models: Path, folder: Path) -> Path:
    loraformat.dequantize(FIXTURES / "quantized" / "nf4", folder / "dense")
    return folder / "dense"


def gguf_adapter(models: Path, folder: Path) -> Path:
    loraformat.convert(models / "adapter", folder / "gguf", to="gguf", base=models / "base")
    return folder / "gguf"


def mlx_adapter(models: Path, folder: Path) -> Path:
    loraformat.convert(models / "adapter", folder / "mlx", to="mlx", base=models / "base")
    return folder / "mlx"


def pipeline(models: Path, folder: Path) -> Path:
    (folder / "pipe").mkdir()
    (folder / "pipe" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return folder / "pipe"


def fixture(name: str) -> Callable[[Path, Path], Path]:
    return lambda models, folder: next(path for path in sorted((GOOD / name).iterdir()))


KINDS: dict[str, tuple[Callable[[Path, Path], Path], str, str, str]] = {
    # kind: (what, relation, library, how it is loaded)
    "peft": (lambda models, folder: models / "adapter", "adapter", "peft", "PeftModel.from_pretrained"),
    "dora": (lambda models, folder: GOOD / "peft" / "dora", "adapter", "peft", "PeftModel.from_pretrained"),
    "native": (lambda models, folder: next(iter((GOOD / "native").iterdir())), "adapter", "", "--to peft"),
    "gguf": (gguf_adapter, "adapter", "", "--lora adapter.gguf"),
    "mlx": (mlx_adapter, "adapter", "mlx", "mlx_lm.generate"),
    "kohya": (fixture("kohya"), "adapter", "diffusers", "pipe.load_lora_weights"),
    "diffusers": (fixture("diffusers"), "adapter", "diffusers", "pipe.load_lora_weights"),
    "merged": (merged, "merge", "transformers", "AutoModelForCausalLM.from_pretrained"),
    "quantized": (lambda models, folder: FIXTURES / "quantized" / "nf4", "quantized", "transformers", "AutoModel"),
    "dequantized": (dequantized, "", "transformers", "AutoModel"),
    "pipeline": (pipeline, "", "diffusers", "DiffusionPipeline.from_pretrained"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_of_every_kind(kind: str, models: Path, hub: Hub, online: Hub, tmp_path: Path) -> None:
    make, relation, library, loading = KINDS[kind]
    path = make(models, tmp_path)
    text = text_of(loraformat.card(path, base="hf://acme/base", name="tester/out"))
    fields = parsed(text)
    assert fields["base_model"] == ["acme/base"]
    assert fields.get("base_model_relation", "") == relation
    assert fields.get("library_name", "") == library
    assert fields["license"] == "apache-2.0"
    assert "loraformat" in fields["tags"]
    assert loading in text
    assert "tester/out" in text
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert text_of(loraformat.card(path, tmp_path / "README.md", base="hf://acme/base", name="tester/out")) == text
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


def test_a_merge_says_what_was_merged(online: Hub, models: Path) -> None:
    loraformat.merge("hf://acme/base", ["hf://acme/adapter=0.5"], "hf://tester/merged")
    text = online.read("tester/merged", "README.md").decode()
    manifest = json.loads(online.read("tester/merged", "loraformat.manifest.json"))
    assert parsed(text)["base_model_relation"] == "merge"
    for words in (
        "[`acme/adapter`](https://huggingface.co/acme/adapter), strength 0.5, rank 2, targets `q_proj`, `v_proj`",
        "Retained after rounding: 100.00% of the update",
        manifest["sha256"],
        "vllm serve tester/merged",
    ):
        assert words in text
    assert "README.md" not in {entry["name"] for entry in manifest["outputs"]}
    assert loraformat.verify("hf://tester/merged").ok
    alone = text_of(loraformat.card("hf://tester/merged"))
    assert parsed(alone) == parsed(text)
    assert manifest["adapters"][0]["digest"][:12] in alone


def test_a_local_output_gets_no_card(models: Path) -> None:
    assert (models / "merged" / "README.md").read_bytes() == (models / "base" / "README.md").read_bytes()


def test_what_a_person_wrote_stays(online: Hub, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "README.md"
    out.write_text(
        "---\n# a comment\nlicense: mit\nmodel-index:\n- name: x\n  results: []  # none\ntags:\n- mine\n---\nAbove.\n"
    )
    first = text_of(loraformat.card(models / "adapter", out, base="hf://acme/base"))
    fields = parsed(first)
    assert fields["license"] == "mit"
    assert fields["tags"][0] == "mine"
    assert {"lora", "loraformat"} <= set(fields["tags"])
    assert "# a comment\nlicense: mit\nmodel-index:\n- name: x\n  results: []  # none\n" in first
    out.write_text("\n".join(["Before.", *first.splitlines()[first.splitlines().index("---", 1) + 1 :], "After."]))
    again = out.read_text()
    head = first[: first.index("---\n", 4) + 4]
    out.write_text(head + again)
    second = text_of(loraformat.card(models / "merged", out, base="hf://acme/base"))
    lines = second.splitlines()
    assert lines.index("Before.") < lines.index("# README\\.md") if "# README\\.md" in lines else "Before." in lines
    assert "After." in lines
    assert "Above." in lines
    assert parsed(second)["base_model_relation"] == "merge"  # ours, so that it follows the files
    assert parsed(second)["license"] == "mit"  # theirs
    assert second.count("loraformat:begin") == 1
    assert text_of(loraformat.card(models / "merged", out, base="hf://acme/base")) == second


def test_an_overwritten_repository_keeps_the_text_of_its_card(online: Hub) -> None:
    loraformat.merge("hf://acme/base", ["hf://acme/adapter"], "hf://tester/merged")
    card = online.read("tester/merged", "README.md").decode()
    online.put("tester/merged", {"README.md": (card + "\n## Evaluation\n\n42\n").encode()})
    loraformat.merge("hf://acme/base", ["hf://acme/adapter=0.5"], "hf://tester/merged", overwrite=True)
    text = online.read("tester/merged", "README.md").decode()
    assert "strength 0.5" in text
    assert "strength 1," not in text
    assert "## Evaluation\n\n42" in text


HOSTILE = [
    "x\n---\nlicense: mit",
    "`code` ``more``",
    "<script>alert(1)</script>",
    "<!-- loraformat:end -->",
    "a](http://evil) ![x](y)",
    'quote" \\ and #',
    "no",
    "\u202eevil\u2066",
    "*/ {{7*7}} ${HOME}",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_files_do_not_break_out(name: str, online: Hub, models: Path, tmp_path: Path) -> None:
    from markdown_it import MarkdownIt

    adapter = tmp_path / "adapter"
    shutil.copytree(models / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = name
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    plain = text_of(loraformat.card(models / "adapter", name="tester/out"))
    text = text_of(loraformat.card(adapter, name=name))
    fields = parsed(text)
    assert set(fields) <= {*parsed(plain), "base_model"}
    assert fields.get("license") is None

    def shape(source: str) -> list[str]:
        return [token.type for token in MarkdownIt("commonmark").parse(source.split("---\n", 2)[2])]

    def inline(source: str) -> set[str]:
        tokens = MarkdownIt("commonmark").parse(source.split("---\n", 2)[2])
        return {child.type for token in tokens for child in token.children or ()}

    assert shape(text) == shape(plain)
    assert inline(text) <= {*inline(plain), "text_special"}
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert text_of(loraformat.card(adapter, tmp_path / "README.md", name=name)) == text


@pytest.mark.parametrize("text", ["---\nlicense: [mit\n---\n", "---\n- a\n---\n", "---\nlicense: &a mit\n---\n"])
def test_front_matter_that_cannot_be_read_is_an_error(text: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(InvalidYaml):
        loraformat.card(models / "adapter", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == text


def test_a_field_that_the_hub_does_not_take_is_an_error(models: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nbase_model_relation: lora\n---\n")
    with pytest.raises(ConfigError, match="expected adapter, merge, quantized, finetune"):
        loraformat.card(models / "adapter", tmp_path / "README.md")
    with pytest.raises(UsageError, match="written to a local file"):
        loraformat.card(models / "adapter", "hf://tester/x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError):
        loraformat.card(tmp_path / "empty")


def test_what_is_missing_is_found_by_the_rules_of_validate(models: Path, tmp_path: Path) -> None:
    codes = {finding.code for finding in loraformat.card(models / "adapter").findings}
    assert codes == {"LF503"}  # no base is given, so that no license is known
    shutil.copytree(models / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("---\nbase_model: acme/base\ntags: lora\nlicense: mit\n---\n")
    assert "LF512" in {finding.code for finding in loraformat.validate(tmp_path / "adapter").findings}


def test_a_card_replaces_nothing_but_a_card(models: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(models / "adapter", adapter)
    (tmp_path / "latin.md").write_bytes(b"caf\xe9")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link.md").symlink_to(adapter / "adapter_config.json")
    (tmp_path / "hard.md").hardlink_to(adapter / "adapter_config.json")
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    for name in (
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "latin.md",
        "notes.txt",
        "link.md",
        "hard.md",
    ):
        with pytest.raises(StorageError):
            loraformat.card(adapter, tmp_path / name)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    loraformat.card(adapter, adapter / "README.md")
    assert "loraformat:begin" in (adapter / "README.md").read_text()


def test_what_a_person_wrote_stays_to_the_byte(models: Path, tmp_path: Path) -> None:
    text = "one\r\ntwo\x0bthree\x0cfour\x85five\u2028six\r\n\r\nend"
    out = tmp_path / "README.md"
    out.write_bytes(f"---\r\nlicense: mit\r\ntags:\r\n- mine\r\n---\r\n{text}\n".encode())
    loraformat.card(models / "adapter", out)
    first = out.read_bytes()
    assert first.endswith(f"<!-- loraformat:end -->\n\n{text}\n".encode())
    assert b"license: mit\r\n" in first
    assert first.count(b"\n---\n") == 1
    loraformat.card(models / "adapter", out)
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (b"x" * (2 << 20), "bytes, but at most"),
        (b"---\nlicense: [a\n---\nmine", "README.md"),
        (b"---\nbase_model: {a: 1}\n---\nmine", "expected a name"),
        (b"caf\xe9", "not text in UTF-8"),
    ],
)
def test_a_card_that_cannot_be_kept_is_known_before_anything_is_computed(
    card: bytes, message: str, online: Hub
) -> None:
    online.put("tester/theirs", {"README.md": card})
    done: list[int] = []
    with pytest.raises(LoraFormatError, match=message):
        loraformat.merge(
            "hf://acme/base",
            ["hf://acme/adapter"],
            "hf://tester/theirs",
            overwrite=True,
            progress=lambda now, total: done.append(now),
        )
    assert done == []
    assert online.read("tester/theirs", "README.md") == card
    without = loraformat.Publication(card=False)
    loraformat.merge("hf://acme/base", ["hf://acme/adapter"], "hf://tester/theirs", overwrite=True, publication=without)
    assert online.read("tester/theirs", "README.md") == card
