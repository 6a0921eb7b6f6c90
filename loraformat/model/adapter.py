"""An adapter in memory, independent of its format."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loraformat.diagnostics import Finding
from loraformat.model.bundle import Json, RawFile
from loraformat.model.patterns.keys import is_end_of
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Update

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The config of an adapter, independent of its format. What can be derived from the updates is not stored twice.

    Attributes:
        base_model: name or path of the base, as the file has it.
        base_revision: commit or tag of the base.
        base_fingerprint: hash of the base, if the format has one.
        task: the task of the adapter, as in the format (PEFT's `task_type`).
        declared_ranks: base weight → rank that the config states for it, if any.
        targets: declared target modules: names or suffixes, or one regular expression, or None.
        vocab_size: rows of the embedding tables after the adapter.
        base_vocab_size: rows before.
        tied: groups of weights that share one table; () for "none are tied"; None for unknown.
        fan_in_fan_out: the source's claim that weights are stored as (in, out); None if it makes none. Shapes decide
            first, this flag only for a square weight of an unknown architecture.
        transposed: the modules for which that is claimed, by their ends, if not for all; None without such a list.
        transposes_square_experts: whether stacked experts whose matrices are square are stored as the transposes of the
            updates; None for "as the architecture has it".
        layers: for an adapter on a stack with repeated layers: which of the base's layers each of its layers copies;
            None for the base's own stack.
        pipeline: for an adapter of an image or video model: which components it changes; None for one model.
        raw: the source config, verbatim; for files without one, the metadata in the header of the weights.
    """

    base_model: str | None = None
    base_revision: str | None = None
    base_fingerprint: str | None = None
    task: str | None = None
    declared_ranks: Mapping[str, int] = field(default_factory=dict)
    targets: tuple[str, ...] | str | None = None
    vocab_size: int | None = None
    base_vocab_size: int | None = None
    tied: tuple[tuple[str, ...], ...] | None = None
    fan_in_fan_out: bool | None = None
    transposed: tuple[str, ...] | None = None
    transposes_square_experts: bool | None = None
    layers: tuple[int, ...] | None = None
    pipeline: Pipeline | None = None
    raw: Mapping[str, Json] = field(default_factory=dict)

    def claims_transposed(self, module: str) -> bool | None:
        """Whether the weight of a module is claimed to be stored as (in, out)."""
        if self.transposed is None:
            return self.fan_in_fan_out
        return any(is_end_of(name, module) for name in self.transposed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What is known of the image or video model that an adapter changes.

    The name of an update is `<component>.<weight>`, where `<weight>` is its name in the component's own checkpoint:
    "unet.conv_in.weight", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.weight". Where the adapter was read for
    a base that is one component, or one file with the names of the original, those of `bare` are named as that base
    names them, without a component: "double_blocks.0.img_attn.qkv.weight".

    Attributes:
        families: names in `naming.families` of the families that explain all modules of the denoiser, the likeliest
            first; () for one that no table has.
        components: those that are adapted, sorted.
        bare: the component of the updates whose names have no component in front; "" where all have one.
        prefix: what stands before the names of the bare component in the base: "model.diffusion_model." in a
            checkpoint of Stable Diffusion; else "".
        is_original: whether the bare component has the names of the original, in which modules may be fused.
        homes: other components of a checkpoint in one file → what stands before their names there.
        open_clip: those of them that have the names of OpenCLIP.
        spellings: component → how the file spells it, which programs differ in: ("lora_unet_ original lora_down",).
    """

    families: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    bare: str = ""
    prefix: str = ""
    is_original: bool = False
    homes: Mapping[str, str] = field(default_factory=dict)
    open_clip: tuple[str, ...] = ()
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The likeliest family; "" for none that is known."""
        return self.families[0] if self.families else ""

    def component_of(self, weight: str) -> str:
        """The component that a weight belongs to.

        >>> Pipeline(components=("transformer",)).component_of("transformer.norm_out.linear.weight")
        'transformer'
        """
        for component, head in self.homes.items():
            if weight.startswith(head):
                return component
        first = weight.partition(".")[0]
        return first if first in self.components and first != self.bare else self.bare or first

    def head_of(self, component: str) -> str:
        """What stands before the names of a component in the adapter's updates."""
        return self.prefix if component == self.bare else self.homes.get(component, f"{component}.")


@dataclass(frozen=True, slots=True)
class UpdateGroup:
    """Low-rank updates that differ in nothing but their weights and values, or one update of another kind.

    Attributes:
        update: one of them: what its headers say is true of all.
        declared_rank: what the config states for them, or None.
        weights: the base weights, sorted; one that has two such updates stands there twice.
    """

    update: Update
    declared_rank: int | None
    weights: list[str]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter in memory, independent of its format: all formats are read into it and written from it.

    >>> import loraformat
    >>> adapter = loraformat.load_adapter("fixtures/good/peft/tiny-llama")
    >>> for update in adapter.updates["model.layers.0.self_attn.v_proj.weight"]:
    ...     print(type(update).__name__, update.shape, update.scale)
    LowRank (4, 8) 1.5

    Attributes:
        updates: base weight → what is done to it, in order; sorted by name. Names are those of the module tree, with
            the parameter's own name at the end: "model.layers.0.self_attn.q_proj.weight", "….q_proj.bias".
        tokenizer: tokenizer files, copied unchanged.
        other_files: regular files of the folder that are copied along; never dotfiles, subfolders, pickles, optimizer
            state.
        unclaimed: tensors that the reader did not recognize: kept and reported, never dropped silently.
        notes: findings of the reader.
        origin: the adapter with its original names and order of rows, if `updates` has those of a base in a GGUF file;
            otherwise None.
    """

    config: AdapterConfig
    updates: Mapping[str, tuple[Update, ...]]
    tokenizer: Mapping[str, RawFile] = field(default_factory=dict)
    other_files: Mapping[str, RawFile] = field(default_factory=dict)
    unclaimed: Mapping[str, LazyTensor] = field(default_factory=dict)
    notes: tuple[Finding, ...] = ()
    origin: Adapter | None = None

    def only(self, component: str) -> Adapter:
        """The updates of one component of a pipeline, under the names of its own checkpoint.

        Of a base in one file they keep the names that they have there.
        """
        prefix, pipeline = f"{component}.", self.config.pipeline
        bare = pipeline is not None and (pipeline.bare == component or component in pipeline.homes)
        names = {
            name: name.removeprefix(prefix)
            for name in self.updates
            if name.startswith(prefix) or (bare and pipeline is not None and pipeline.component_of(name) == component)
        }
        ranks = {names[name]: rank for name, rank in self.config.declared_ranks.items() if name in names}
        return replace(
            self,
            updates=dict(sorted((after, self.updates[name]) for name, after in names.items())),
            config=replace(self.config, declared_ranks=ranks, pipeline=None),
        )

    def delta(
        self,
        weight: str,
        base: Checkpoint | NDArray[Any] | None = None,
        *,
        dtype: str = "float32",
    ) -> NDArray[np.float32] | NDArray[np.float64]:
        """ΔW of one weight: what all its updates add to it, dense, scale included.

        >>> import loraformat
        >>> adapter = loraformat.load_adapter("fixtures/good/peft/tiny-llama")
        >>> adapter.delta("model.layers.0.self_attn.v_proj.weight").shape
        (4, 8)

        Args:
            weight: a key of `updates`.
            base: of what the adapter was trained on, the opened checkpoint, or the values of the weight in the
                orientation of the model. LoRA, LoHa, LoKr and dense deltas need none; DoRA, replaced weights, trained
                rows, factors (IA3, OFT, …) and what is computed from the base (PiSSA, …) do.
            dtype: "float32" or "float64"; it is computed in float64 and rounded once.

        Returns: W' - W in the shape and orientation of the weight in the model: (out, in) for a linear layer, however
            the file or the checkpoint stores it; (out, in, *kernel) for a convolution, which LoHa and LoKr know only
            with a base, and (out, in · prod(kernel)) without. Rows that the base lacks count as zero.

        Raises:
            UsageError (LF021): there is no update for `weight`, or it needs a base and none was given.
            MergeError (LF206): the scale is unknown. NonFiniteValue (LF402): the update holds NaN or infinity.
            UnmatchedUpdate (LF301), ShapeMismatch (LF302), UnsupportedUpdate (LF013): it could not be merged into the
                base.
        """
        import loraformat

        found: NDArray[np.float32] | NDArray[np.float64] = loraformat.delta(self, weight, base, dtype=dtype)
        return found

    def component_of(self, weight: str) -> str:
        """The component of a pipeline that a weight belongs to: "unet"; "" for an adapter of one model.

        >>> import loraformat
        >>> loraformat.load_adapter("fixtures/good/peft/tiny-llama").component_of("model.layers.0.mlp.up_proj.weight")
        ''
        """
        return "" if self.config.pipeline is None else self.config.pipeline.component_of(weight)

    @cached_property
    def update_groups(self) -> tuple[UpdateGroup, ...]:
        """All updates, grouped by shape, dtype and scale: a model repeats its layers, so there are few groups."""
        declared = self.config.declared_ranks
        groups: dict[Hashable, UpdateGroup] = {}
        for weight, chain in self.updates.items():
            rank = declared.get(weight)
            for update in chain:
                key = (rank, *_outline(update)) if isinstance(update, LowRank) else id(update)
                group = groups.get(key)
                if group is None:
                    group = groups[key] = UpdateGroup(update, rank, [])
                group.weights.append(weight)
        return tuple(groups.values())


def _outline(update: LowRank) -> tuple[Hashable, ...]:
    """Everything of an update but its values."""
    up, down, magnitude = update.up, update.down, update.magnitude
    vector = None if magnitude is None else (magnitude.vector.shape, magnitude.vector.dtype, magnitude.axis)
    return (up.shape, up.dtype, down.shape, down.dtype, update.scale, vector, update.kernel, update.is_embedding)


def module_of(base_weight: str) -> str:
    """The module path of a weight: without its last component (`.weight`, `.bias`)."""
    return base_weight.rpartition(".")[0]
