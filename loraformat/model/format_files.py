"""The marker files of each format, by which it is detected before its module is imported."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from loraformat.errors import ContainerError
from loraformat.model.bundle import Bundle, File, JsonFile, TensorFile


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatFiles:
    """What tells a format. Its module is `loraformat.formats.NAME`, whose `sniff` decides.

    Attributes:
        name: as in `--to peft`.
        config: name of its JSON config. Where one lies in a folder, the names of tensors tell nothing.
        own_key, foreign_key: a key that the config must have, or by which it is another format's.
        weights: names of its weight files.
        settings: names of other files that only this format has.
        folders: how names of subfolders begin that this format has.
        tensors: how names of its tensors end, where one file of tensors may be enough; () where it is not.
        starts: how names of its tensors begin, where that tells too: a pattern; "" for anyhow.
        has_experts: whether a folder may hold a file for each of two experts.
    """

    name: str
    config: str = ""
    own_key: str = ""
    foreign_key: str = ""
    weights: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    starts: str = ""
    has_experts: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """The files of which one is enough, the most telling first; a config that others have too is none."""
        return (*([self.config] if self.config and not self.foreign_key else []), *self.weights, *self.settings)

    def may_fit(self, bundle: Bundle) -> bool:
        """Whether the module has to be asked about a bundle; False only where its `sniff` finds nothing."""
        if any(name in bundle.files for name in (*self.weights, *self.settings)):
            return True
        if self.folders and any(name.startswith(self.folders) for name in bundle.folders):
            return True
        if self.own_key and any(name.endswith(f"/{self.config}") for name in bundle.files):
            return True
        if self.config and self.config in bundle.files:
            return self._may_own(bundle.files[self.config])
        pair = experts_of(bundle) if self.has_experts else ()
        file = pair[0] if pair else the_file(bundle)
        return bool(self.tensors) and _has_tensor(file, self.tensors, re.compile(self.starts))

    def _may_own(self, config: File) -> bool:
        """Whether a config may be this format's; a damaged one may be anybody's."""
        try:
            value = config.load() if isinstance(config, JsonFile) else None
        except ContainerError:
            return True
        if not isinstance(value, dict):
            return True
        return (not self.own_key or self.own_key in value) and (not self.foreign_key or self.foreign_key not in value)


# How names of tensors of image and video adapters end, in every dialect.
IMAGE_ENDINGS = (
    *(".weight", ".alpha", ".lora_A", ".lora_B", ".dora_scale", ".magnitude", ".diff", ".diff_b", ".w_norm", ".b_norm"),
    *(".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".lokr_w2", ".set_weight"),
)
# How they begin: a component's prefix, or the first module of a U-Net or a diffusion transformer.
IMAGE_STARTS = (
    r"(module\.|_orig_mod\.|base_model\.model\.)*(lora_(unet|te[123]?|transformer|prior)_|lycoris_|(model\.)?diffusion_model\."
    r"|text_encoders?[._]|(unet|prior|transformer_2)\.|(transformer\.)?("
    r"(single_)?transformer_blocks\.|(double|single|joint|down|up|input|output)_blocks\.|mid_block\.|middle_block\."
    r"|blocks\.[0-9]+\.(attn[12]|self_attn|cross_attn|ffn)\.|(noise|context)_refiner\.|sformer_blocks\."
    r"|layers\.[0-9]+\.(attention|feed_forward|adaLN_modulation)\.|distilled_guidance_layer\.))"
)

# The order of `loraformat formats`. It decides nothing: where two formats fit with equal right, the user is asked.
FORMAT_FILES = (
    FormatFiles(
        name="native",
        config="lora_config.json",
        weights=(
            "lora_weights.safetensors",
            "lora_weights.pt",
            "embedding_weights.safetensors",
            "embedding_weights.pt",
        ),
    ),
    FormatFiles(
        name="peft",
        config="adapter_config.json",
        own_key="peft_type",
        weights=("adapter_model.safetensors", "adapter_model.bin"),
    ),
    FormatFiles(
        name="mlx",
        config="adapter_config.json",
        foreign_key="peft_type",
        weights=("adapters.safetensors", "adapters.npz"),
    ),
    FormatFiles(name="tinker", config="adapter_config.json", own_key="r", foreign_key="peft_type"),
    FormatFiles(name="gguf", weights=("adapter.gguf",), tensors=(".weight.lora_a", ".weight.lora_b")),
    FormatFiles(name="loralib", settings=("lora_settings.json",), tensors=(".lora_A", ".lora_B")),
    FormatFiles(name="litgpt", weights=("lit_model.pth.lora",)),
    FormatFiles(
        name="torchtune",
        weights=("adapter_model.pt", *(f"adapter_{epoch}.pt" for epoch in range(10))),
        tensors=(".lora_a.weight", ".lora_b.weight"),
    ),
    FormatFiles(
        name="nemo",
        settings=("model_weights.ckpt", ".metadata"),
        folders=("mp_rank_", "tp_rank_"),
        tensors=(".linear_in.weight", ".linear_out.weight"),
    ),
    FormatFiles(name="minlora", tensors=(".parametrizations.weight.0.lora_A", ".parametrizations.weight.0.lora_B")),
    FormatFiles(name="raschka", tensors=(".lora.A", ".lora.B")),
    FormatFiles(name="minimind", tensors=(".lora.A.weight", ".lora.B.weight")),
    FormatFiles(
        name="diffusers",
        weights=("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
        tensors=IMAGE_ENDINGS,
        starts=IMAGE_STARTS,
        has_experts=True,
    ),
    FormatFiles(name="kohya", tensors=IMAGE_ENDINGS, starts=IMAGE_STARTS, has_experts=True),
    FormatFiles(name="comfy", tensors=IMAGE_ENDINGS, starts=IMAGE_STARTS, has_experts=True),
    FormatFiles(name="lycoris", tensors=IMAGE_ENDINGS, starts=IMAGE_STARTS, has_experts=True),
    FormatFiles(name="xlabs", tensors=("_lora.down.weight", "_lora1.down.weight", "_lora2.down.weight")),
    FormatFiles(name="dump", tensors=("",)),
)

NAMES = tuple(row.name for row in FORMAT_FILES)
CONFIGS = tuple(dict.fromkeys(row.config for row in FORMAT_FILES if row.config))


def has_marker(names: Collection[str]) -> bool:
    """Whether a folder of these files is an adapter, sound or not: one is a file that only adapters have."""
    return any(marker in names for row in FORMAT_FILES for marker in row.markers)


def weights_beside(config: str) -> tuple[str, ...]:
    """The weight files, of any format, that a config lies beside."""
    return tuple(name for row in FORMAT_FILES if row.config == config for name in row.weights)


def is_part_of(name: str, weights: str) -> bool:
    """Whether a file is a weight file of a name, or a part of it: `adapter_model-00001-of-00002.safetensors`."""
    stem, _, suffix = weights.rpartition(".")
    return name == weights or (name.startswith(f"{stem}-") and name.endswith(f".{suffix}"))


def has_config(bundle: Bundle) -> bool:
    """Whether a config of any format lies in the folder."""
    return any(name in bundle.files for name in CONFIGS)


def the_file(bundle: Bundle) -> TensorFile | None:
    """The file that the user named, or the only tensor file of a folder that no format's config explains."""
    if not bundle.is_single_file and has_config(bundle):
        return None
    files = bundle.tensor_files()
    return files[0] if len(files) == 1 else None


# What file names say of the two experts of Wan 2.2; nothing in the files does.
_EXPERTS = (
    (re.compile(r"(?:^|[^a-z])high(?:[^a-z]|noise|$)"), "transformer"),
    (re.compile(r"(?:^|[^a-z])low(?:[^a-z]|noise|$)"), "transformer_2"),
)


def expert_of(name: str) -> str:
    """Which of two experts a file is for, by its name; "" for one that does not say.

    >>> expert_of("style_high_noise.safetensors"), expert_of("style-LOW.safetensors"), expert_of("style.safetensors")
    ('transformer', 'transformer_2', '')
    """
    found = [component for pattern, component in _EXPERTS if pattern.search(name.lower())]
    return found[0] if len(found) == 1 else ""


def experts_of(bundle: Bundle) -> tuple[TensorFile, ...]:
    """The two files of a folder that is a pair for two experts, high noise first; () for another folder."""
    files = {expert_of(file.name): file for file in bundle.tensor_files()}
    is_pair = set(files) == {"transformer", "transformer_2"} and len(bundle.tensor_files()) == 2
    return () if not is_pair or has_config(bundle) else (files["transformer"], files["transformer_2"])


def _has_tensor(file: TensorFile | None, endings: tuple[str, ...], start: re.Pattern[str]) -> bool:
    """Whether the names in the one tensor file tell; a file that cannot be opened is for the module to judge."""
    try:
        return file is not None and any(name.endswith(endings) and start.match(name) for name in file.open().entries)
    except ContainerError:
        return True
