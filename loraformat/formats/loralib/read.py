"""loralib, file to Adapter: headers, and the settings that our own writer puts beside the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loraformat.diagnostics import in_file
from loraformat.formats.kit.base import NO_HINTS, Hints
from loraformat.formats.kit.fields import (
    as_integer,
    as_object,
    as_texts,
    optional_boolean,
    optional_integer,
    optional_number,
)
from loraformat.formats.kit.pairs.read import Dialect, Layer, read_pairs
from loraformat.formats.kit.pairs.spelling import LORALIB, Pair
from loraformat.formats.kit.scaling import MAX_RANK, agreed
from loraformat.formats.loralib.layers import layer
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle, JsonFile

SETTINGS = "lora_settings.json"
_MOST_KERNEL = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What lora_settings.json says, which our own writer puts beside the file.

    Attributes:
        rank, alpha: of all modules.
        tables: modules that are embeddings.
        kernel_sizes: module → size of the square kernel of a convolution.
        replaced: weights that are replaced as a whole.
    """

    rank: int | None = None
    alpha: float | None = None
    tables: tuple[str, ...] = ()
    kernel_sizes: Mapping[str, int] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    fan_in_fan_out: bool | None = None


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of a file that `loralib.lora_state_dict` made, or our own writer.

    Raises:
        MissingFile (LF101): not exactly one tensor file.
        ConfigError (LF103): shapes that do not fit, or leave open what is adapted; the message says what to assume.
        FormatError (LF012): two names mean the same tensor.
    """
    settings = _settings(bundle)
    transposed = agreed(settings.fan_in_fan_out, hints.all_transposed, "fan_in_fan_out", in_file(SETTINGS))

    def build(pairs: Mapping[str, Pair], rank: int | None, known: Hints) -> dict[str, Layer]:  # noqa: ARG001
        return {
            module: layer(module, _with_shape(pair, settings.kernel_sizes.get(module)), known, settings.tables)
            for module, pair in pairs.items()
        }

    found = read_pairs(
        bundle,
        Dialect(
            spellings=LORALIB,
            build=build,
            keeps_biases=True,
            replaced=settings.replaced,
            settings=(settings.rank, settings.alpha),
            settings_file=SETTINGS if SETTINGS in bundle.files else None,
        ),
        hints if hints.transposed else replace(hints, fan_in_fan_out=transposed),
    )
    return replace(found, config=replace(found.config, fan_in_fan_out=transposed))


def _with_shape(pair: Pair, size: int | None) -> Pair:
    """The pair, knowing the shape of its convolution's weight."""
    if size is None or pair.a is None or pair.b is None:
        return pair
    shape = (pair.b.shape[0] // size, pair.a.shape[-1] // size, size, size)
    return replace(pair, base_shape=shape)


def _settings(bundle: Bundle) -> Settings:
    file = bundle.files.get(SETTINGS)
    if not isinstance(file, JsonFile):
        return Settings()
    raw = as_object(file.load(), in_file(SETTINGS))
    return Settings(
        rank=optional_integer(raw, "r", SETTINGS, 1, MAX_RANK),
        alpha=optional_number(raw, "lora_alpha", SETTINGS),
        tables=as_texts(raw.get("embeddings", []), in_file(SETTINGS, "embeddings")),
        kernel_sizes={
            module: as_integer(size, in_file(SETTINGS, "kernel_sizes", module), 1, _MOST_KERNEL)
            for module, size in as_object(raw.get("kernel_sizes", {}), in_file(SETTINGS, "kernel_sizes")).items()
        },
        replaced=as_texts(raw.get("replaced", []), in_file(SETTINGS, "replaced")),
        fan_in_fan_out=optional_boolean(raw, "fan_in_fan_out", in_file(SETTINGS)),
    )
