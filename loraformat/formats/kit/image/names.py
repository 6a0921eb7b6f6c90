"""What a tensor name of an image adapter is made of: a component, a module path and the role of the tensor.

Source: diffusers 0.42.1, loaders/lora_conversion_utils.py; sd-scripts 48d368fa, networks/lora.py; ComfyUI 0.26.1,
comfy/lora.py; lycoris_lora 4.1.3, lycoris/modules; x-flux, src/flux/modules/layers.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from loraformat.formats.kit.pairs.spelling import WRAPPERS
from loraformat.model.tensors import LazyTensor
from loraformat.naming.families import COMPONENTS

# The role of a tensor, by how its name ends. Roles of one letter more are the same thing in another spelling.
_ROLES = {
    **dict.fromkeys(("lora_down.weight", "lora_A.weight", "lora_A", "lora.down.weight", "down.weight"), "down"),
    **dict.fromkeys(("lora_up.weight", "lora_B.weight", "lora_B", "lora.up.weight", "up.weight"), "up"),
    **dict.fromkeys(("lora_linear_layer.down.weight", "lora_down", "lora.down"), "down"),
    **dict.fromkeys(("lora_linear_layer.up.weight", "lora_up", "lora.up"), "up"),
    **dict.fromkeys(("lora_B.bias", "lora_up.bias"), "up_bias"),
    **dict.fromkeys(("lora_mid.weight", "lora_mid"), "mid"),
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    **dict.fromkeys(("lora_magnitude_vector", "lora_magnitude_vector.weight", "magnitude"), "magnitude"),
    **dict.fromkeys(("diff", "w_norm"), "diff"),
    **dict.fromkeys(("diff_b", "b_norm"), "diff_b"),
    **{role: role for role in ("set_weight", "reshape_weight")},
    # ComfyUI says the parameter where it is not `weight`: the norms of FLUX have a `scale`.
    **{f"scale.{role}": role for role in ("diff", "set_weight")},
    **{f"hada_{role}": f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{role}": f"lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
# Algorithms that are not sums of matrices, by a role that only they have.
FOREIGN = {
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_R.weight", "oft_R"), "OFT"),
    "boft_R": "BOFT",
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight"), "GLoRA"),
    "on_input": "IA3",
    "bone": "Bone",
}
_ADAPTER_NAME = re.compile(r"\.default(_0)?(?=\.|$)")
_MOST_PARTS = 3
_NAMED_ROLES = {**_ROLES, **{end: f"foreign:{name}" for end, name in FOREIGN.items()}}

# What stands in front of a flattened path → the slot of its component; "" is the denoiser.
_FLAT = {
    "lora_unet__": "",  # a slip of Wan-Fun's converter
    "lora_unet_": "",
    "lora_transformer_": "",
    "lora_prior_unet_": "prior",
    "lora_prior_te_": "text_encoder",
    "lora_te1_": "te1",
    "lora_te2_": "te2",
    "lora_te3_": "te3",
    "lora_te_": "te",
    "lycoris_": "",
}
_DOTTED = {
    "model.diffusion_model.": "",
    "diffusion_model.": "",
    **{f"text_encoders.{name}.transformer.": name for name in ("clip_l", "clip_g", "t5xxl", "llama")},
    **{f"{component}.": component for component in COMPONENTS},
}
_FLAT_PREFIX = re.compile("|".join(sorted(map(re.escape, _FLAT), key=len, reverse=True)))
_DOTTED_PREFIX = re.compile("|".join(sorted(map(re.escape, _DOTTED), key=len, reverse=True)))
_PEFT = "base_model.model."
# diffusers of 2023, and XLabs: the module's name stands in that of the processor's layer.
_PROCESSOR = re.compile(r"(.+?)(\.processor)?\.(\w+?)_lora([12]?)\.(down|up)\.weight")
_ATTENTION_LEAVES = {"to_out": "to_out.0"}
_CLIP_LEAVES = {f"to_{part}": f"{part}_proj" for part in ("q", "k", "v", "out")}
# Bookkeeping of tools for sliders; it changes no weight.
_AUXILIARY = "_aux."


@dataclass(frozen=True, slots=True)
class Key:
    """One tensor name, taken apart.

    Attributes:
        slot: which component, in the words of the file: "" for the denoiser, "te2", "clip_l", "text_encoder".
        is_flat: whether the path is flattened, with `_` for each dot.
        path: of the module, as the file spells it.
        role: what the tensor is: "down", "alpha", "lokr_w1"; "foreign:OFT" for an algorithm that is not read.
    """

    slot: str
    is_flat: bool
    path: str
    role: str


def key_of(name: str) -> Key | None:
    """A tensor name taken apart; None for one that has no role.

    >>> key_of("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight")
    Key(slot='', is_flat=True, path='double_blocks_0_img_attn_qkv', role='down')
    >>> key_of("unet.conv_in.lora_A.default.weight")
    Key(slot='unet', is_flat=False, path='conv_in', role='down')
    """
    flat = _FLAT_PREFIX.match(name)
    if flat is not None:
        path, _, end = name[flat.end() :].partition(".")
        role = _role_of_flat(end)
        return None if role is None or not path else Key(_FLAT[flat[0]], is_flat=True, path=path, role=role)
    if name.startswith("module.") or any(wrapper in name for wrapper in WRAPPERS):
        name = ".".join(part for part in name.removeprefix("module.").split(".") if part not in WRAPPERS)
    name = name.removeprefix(_PEFT)
    dotted = _DOTTED_PREFIX.match(name)
    slot, path = ("", name) if dotted is None else (_DOTTED[dotted[0]], name[dotted.end() :].removeprefix(_PEFT))
    return _of_processor(slot, path) or _dotted(slot, path)


def _role_of_flat(end: str) -> str | None:
    role = _NAMED_ROLES.get(end)
    return role if role is not None or ".default" not in end else _NAMED_ROLES.get(_ADAPTER_NAME.sub("", end))


def _dotted(slot: str, path: str) -> Key | None:
    if ".default" in path:
        path = _ADAPTER_NAME.sub("", path)
    parts = path.rsplit(".", _MOST_PARTS)
    for count in range(len(parts) - 1, 0, -1):
        role = _NAMED_ROLES.get(".".join(parts[-count:]))
        if role is not None:
            return Key(slot, is_flat=False, path=".".join(parts[:-count]), role=role)
    return None


def _of_processor(slot: str, path: str) -> Key | None:
    found = _PROCESSOR.fullmatch(path) if "_lora" in path else None
    if found is None:
        return None
    module, _, leaf, number, role = found.groups()
    if leaf in ("qkv", "proj"):
        return Key(slot, is_flat=False, path=f"{module}.processor.{leaf}{number}", role=role)
    leaves = _CLIP_LEAVES if module.endswith("self_attn") else _ATTENTION_LEAVES
    return Key(slot, is_flat=False, path=f"{module}.{leaves.get(leaf, leaf)}", role=role)


@dataclass(slots=True)
class RawModule:
    """The tensors of one module, by role, as a file has them.

    Attributes:
        slot, is_flat, path: see Key.
        names: role → name in the file.
    """

    slot: str
    is_flat: bool
    path: str
    parts: dict[str, LazyTensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the file calls it, for messages: a tensor's name without the role."""
        return next(iter(self.names.values())).split(".lora", 1)[0].removesuffix(".alpha")

    @property
    def prefix(self) -> str:
        """What stands before the path; "bare" for nothing, or where the path is not written as it is."""
        before, separator, _ = next(iter(self.names.values())).partition(self.path)
        return (before if separator else "") or "bare"

    @property
    def kind(self) -> str:
        """What its tensors are called, in the words of rules/runtimes/diffusers.json; "" for dense deltas alone."""
        if "down" in self.parts:
            return next((kind for end, kind in _KINDS if self.names["down"].endswith(end)), "other")
        return next((role[:4] for role in self.parts if role.startswith(("hada_", "lokr_"))), "")


# How the name of the first factor ends → what the tensors of a module are called. The longest first.
_KINDS = (
    (".lora_A.default.weight", "lora_A.default"),
    (".lora_linear_layer.down.weight", "lora_linear_layer"),
    (".lora_down.weight", "lora_down"),
    (".lora_A.weight", "lora_A"),
    (".lora.down.weight", "lora.down"),
    ("_lora.down.weight", "processor"),
)


@dataclass(slots=True)
class RawModules:
    """A file's tensors by module.

    Attributes:
        unknown: names without a role.
        auxiliary: names of bookkeeping, which change nothing.
        twice: (name, name) of two tensors with one role in one module.
    """

    modules: list[RawModule] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    auxiliary: list[str] = field(default_factory=list)
    twice: list[tuple[str, str]] = field(default_factory=list)


def modules_of(entries: Mapping[str, LazyTensor]) -> RawModules:
    """The tensors of a file by module, in the order of the file."""
    found = RawModules()
    by_path: dict[tuple[str, bool, str], RawModule] = {}
    for name, tensor in entries.items():
        if name.startswith(_AUXILIARY):
            found.auxiliary.append(name)
            continue
        key = key_of(name)
        if key is None:
            found.unknown.append(name)
            continue
        place = (key.slot, key.is_flat, key.path)
        module = by_path.get(place)
        if module is None:
            module = by_path[place] = RawModule(*place)
            found.modules.append(module)
        if key.role in module.parts:
            found.twice.append((module.names[key.role], name))
        module.parts[key.role], module.names[key.role] = tensor, name
    return found


# Prefixes that no language model's adapter has.
_TELLING = re.compile(
    r"lora_(unet|te[123]?|transformer|prior_unet|prior_te)_|lycoris_|(model\.)?diffusion_model\.|text_encoders\."
    r"|(unet|prior|transformer_2|text_encoder(_[2-4])?)\."
)
_LYCORIS = re.compile(r"lycoris_|.*\.(hada|lokr)_\w+$")
_XLABS = re.compile(r"(double|single)_blocks\.[0-9]+\.processor\.")


def dialect_of(names: Iterable[str]) -> str:
    """The format that most tensor names of a file speak for; "" where none does.

    Which names a file without a component's prefix has is for the families to say, see `resolve.naming_of_images`.
    """
    counts = {"kohya": 0, "lycoris": 0, "comfy": 0, "diffusers": 0, "xlabs": 0}
    for name in names:
        found = _TELLING.match(name)
        dialect = "" if found is None else _dialect(found[0])
        if dialect != "comfy" and _LYCORIS.match(name):  # ComfyUI's own names have LoHa and LoKr too
            counts["lycoris"] += 1
        elif found is not None:
            counts[dialect] += 1
        elif _XLABS.match(name):
            counts["xlabs"] += 1
    if counts["lycoris"]:  # LoHa and LoKr beside plain pairs: the whole file is one of LyCORIS
        return "lycoris"
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else ""


def _dialect(prefix: str) -> str:
    if prefix.startswith("lora_"):
        return "kohya"
    return "comfy" if prefix.endswith("diffusion_model.") or prefix == "text_encoders." else "diffusers"


def sorted_names(modules: Iterable[RawModule]) -> Iterator[str]:
    """All tensor names of modules."""
    for module in modules:
        yield from module.names.values()
