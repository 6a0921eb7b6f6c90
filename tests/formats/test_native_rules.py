"""Every numbered rule of docs/formats/native.md, broken by a folder, and noticed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import bundle, tensors

from loraformat import rules
from loraformat.diagnostics import Severity
from loraformat.errors import InvalidJson, LoraFormatError
from loraformat.formats import native
from loraformat.model.bundle import Bundle, JsonFile

SPEC = Path(__file__).parents[2] / "docs" / "formats" / "native.md"

CONFIG = {"format_version": 1, "method": "lora", "rank": 2, "alpha": 4}
A, B = torch.ones(2, 3), torch.ones(4, 2)
PAIR = {"m.q.lora_A": A, "m.q.lora_B": B}
GOOD: dict[str, Any] = {"lora_config.json": CONFIG, "lora_weights.safetensors": PAIR}


def folder(changes: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """The good folder with other files (None: without) and other config fields."""
    files = {**GOOD, "lora_config.json": {**CONFIG, **fields}, **(changes or {})}
    return {name: content for name, content in files.items() if content is not None}


def weights(**named: torch.Tensor) -> dict[str, Any]:
    """The good weights and others, `__` for a dot."""
    return {"lora_weights.safetensors": {**PAIR, **{name.replace("__", "."): value for name, value in named.items()}}}


def tables(**named: torch.Tensor) -> dict[str, Any]:
    return {"embedding_weights.safetensors": {name.replace("__", "."): value for name, value in named.items()}}


def only(entries: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"lora_weights.safetensors": entries}


# rule → (what is noticed, a folder that breaks the rule), several times where the rule has several sentences
BREAKS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "N1": [("LF101", folder({"lora_config.json": None}))],
    "N2": [
        ("LF101", folder({"lora_weights.safetensors": None})),
        ("LF012", folder({"lora_weights.pt": PAIR})),
    ],
    "N3": [("LF012", folder({"embedding_weights.pt": {"e.weight": A}}))],
    "N4": [
        ("LF223", {"lora_config.json": CONFIG, "lora_weights.pt": tensors(PAIR, "torch", wrapper=("state_dict",))}),
        ("LF223", {"lora_config.json": CONFIG, "lora_weights.pt": tensors(PAIR, "torch", epoch=3)}),
    ],
    "N5": [
        ("LF103", folder({"lora_config.json": [1]})),
        ("LF103", folder({"lora_config.json": {**CONFIG, "x": "x" * 2**24}})),
    ],
    "N6": [("LF012", folder(format_version=value)) for value in (2, 0, "1", True, 1.0, None)],
    "N7": [("LF013", folder(method="ia3")), ("LF013", folder(method=None))],
    "N8": [("LF103", folder(rank=value)) for value in (0, -1, True, "2", 65_537, 10**30, None)],
    "N9": [("LF103", folder(alpha=value)) for value in ("8", True, None, [8])],
    "N10": [("LF103", folder(scaling="alpha"))],
    "N11": [
        ("LF103", folder(rank_exceptions={"q": 2})),
        ("LF103", folder(alpha_exceptions={"m": 2})),
        ("LF103", folder(rank_exceptions={"m.q": 0})),
        ("LF103", folder(alpha_exceptions={"m.q": "2"})),
        ("LF103", folder(rank_exceptions=[])),
    ],
    "N12": [("LF103", folder(target_modules=["q", 3])), ("LF103", folder(target_modules=".*"))],
    "N13": [("LF103", folder(base_model={"name": 3})), ("LF103", folder(base_model=[]))],
    "N14": [("LF103", folder(vocab_size=0)), ("LF103", folder(base_vocab_size=2**31))],
    "N15": [("LF103", folder(tied=value)) for value in (True, [["a.weight"]], [["a.weight", "a.weight"]], "yes")],
    "N16": [("LF103", folder(dtype="int8")), ("LF103", folder(dtype=3))],
    "N29": [
        ("LF103", folder(loraplus_lr_ratio=0)),
        ("LF103", folder(loraplus_lr_ratio="16")),
        ("LF103", folder(tokenizer_sha256="ab")),
        ("LF103", folder(provenance=["me"])),
    ],
    "N17": [
        ("LF210", folder(weights(**{"m..q.lora_A": A, "m..q.lora_B": B}))),
        ("LF210", folder(weights(**{f"{'m' * 1020}.q.lora_A": A, f"{'m' * 1020}.q.lora_B": B}))),
    ],
    "N18": [
        ("LF201", folder(only({"m.q.lora_A": A}))),
        ("LF201", folder(weights(m__e__lora_embedding_B=B))),
        ("LF210", folder(weights(m__q__lora_embedding_A=A, m__q__lora_embedding_B=B))),
    ],
    "N19": [
        ("LF204", folder(only({"m.q.lora_A": torch.ones(3, 3), "m.q.lora_B": torch.ones(4, 3)}))),
        ("LF202", folder(only({"m.q.lora_A": A, "m.q.lora_B": torch.ones(4, 3)}))),
        ("LF204", folder(rank_exceptions={"m.q": 3})),
    ],
    "N20": [
        ("LF205", folder(only({"m.q.lora_A": torch.ones(2, 3, 3), "m.q.lora_B": B}))),
        ("LF205", folder(only({"m.q.lora_A": torch.ones(2, 3, 3), "m.q.lora_B": torch.ones(4, 2, 3)}))),
    ],
    "N21": [
        ("LF202", folder(weights(m__e__lora_embedding_A=torch.ones(2, 9), m__e__lora_embedding_B=torch.ones(2, 4))))
    ],
    "N22": [
        ("LF210", folder(weights(m__other__lora_magnitude=torch.ones(4)))),
        ("LF212", folder(weights(m__q__lora_magnitude=torch.ones(3)))),
    ],
    "N23": [
        ("LF205", folder(tables(embed_tokens__weight=torch.ones(9)))),
        ("LF205", folder(tables(embed_tokens__weight=torch.ones(0, 9)))),
        ("LF227", folder(tables(e__weight=torch.ones(9, 3)), vocab_size=10)),
    ],
    "N24": [
        ("LF103", folder(tables(e__weight__rows=torch.ones(2, 3)))),
        ("LF103", folder(tables(e__weight__rows=torch.ones(2, 3)), rows={"e.weight": [1]})),
        ("LF103", folder(tables(e__weight__rows=torch.ones(2, 3)), rows={"e.weight": [1, 1]})),
        ("LF103", folder(tables(e__weight__rows=torch.ones(2, 3)), rows={"e.weight": -1})),
        ("LF103", folder(tables(e__weight__rows=torch.ones(2, 3)), rows={"e.weight": 2**31})),
        ("LF103", folder(rows={"e.weight": 1})),
    ],
    "N25": [
        ("LF012", folder({**weights(e__weight__replacement=torch.ones(9, 3)), **tables(e__weight=torch.ones(9, 3))})),
        (
            "LF012",
            folder(
                {**weights(e__weight__rows=torch.ones(1, 3)), **tables(e__weight__rows=torch.ones(1, 3))},
                rows={"e.weight": 1},
            ),
        ),
    ],
    "N26": [
        ("LF103", folder(difference_scale={"m.q.bias": 2})),
        ("LF103", folder(weights(m__q__bias__difference=torch.ones(4)), difference_scale={"m.q.bias": "2"})),
    ],
    "N27": [
        ("LF214", folder(only({"m.q.lora_A": A.to(torch.int8), "m.q.lora_B": B}))),
        ("LF214", folder(tables(e__weight=torch.ones(9, 3, dtype=torch.int8)))),
    ],
    "N28": [
        ("LF210", folder(weights(m__q__lora_C=A))),
        ("LF210", folder(weights(m__q__weight=A))),
        ("LF210", folder(tables(m__q__lora_A=A))),
    ],
}


def noticed(files: Bundle) -> set[str]:
    """Codes of warnings and errors, from reading or from the rules."""
    try:
        adapter = native.read(files)
    except LoraFormatError as error:
        return {error.code}
    subject = rules.Subject(bundle=files, format="native", adapter=adapter)
    return {found.code for found in rules.gate(subject) if found.severity >= Severity.WARNING}


CASES = [(rule, code, files) for rule, cases in BREAKS.items() for code, files in cases]


@pytest.mark.parametrize(("rule", "code", "files"), CASES, ids=[f"{rule}-{n}" for n, (rule, _, _) in enumerate(CASES)])
def test_a_broken_rule_is_noticed(rule: str, code: str, files: dict[str, Any]) -> None:
    assert code in noticed(bundle(files)), rule


def test_the_good_folder_breaks_none() -> None:
    assert noticed(bundle(GOOD)) == set()


def test_every_rule_of_the_page_is_broken_here() -> None:
    numbered = re.findall(r"^- \*\*(N\d+)\*\*", SPEC.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(numbered, key=lambda name: int(name[1:])) == [f"N{number + 1}" for number in range(len(numbered))]
    assert sorted(BREAKS) == sorted(numbered)


def test_errors_of_the_json_reader_come_through() -> None:
    """N5: syntax, repeated keys and NaN are the container's business."""

    def load() -> None:
        raise InvalidJson("NaN is not JSON", where="lora_config.json")

    files = {**bundle(GOOD).files, "lora_config.json": JsonFile("lora_config.json", 3, lambda: b"NaN", load)}
    assert noticed(Bundle("memory", files)) == {"LF005"}
