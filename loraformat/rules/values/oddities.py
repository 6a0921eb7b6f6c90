"""Family 4, third part: values that are legal but hardly ever intended (`--deep`)."""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.diagnostics import Severity, counted_of
from loraformat.model.tensors import bytes_of
from loraformat.model.updates import LowRank, Replace, Rows
from loraformat.rules.base import Hit, Subject, first_of, rule
from loraformat.rules.shapes import is_vocabulary_table, updates_of
from loraformat.rules.values.stored import blocks


@rule("LF407", Severity.WARNING, since="0.1.0", slow=True)
def repeated_update(subject: Subject) -> Iterator[Hit]:
    """Two modules have identical factors, bit for bit.

    ## Why it matters
    Training never produces that. A loop saved one module under several names, or tensors that shared memory were
    copied.

    ## Example
    `layers.0.self_attn.q_proj` and `layers.1.self_attn.q_proj` with equal `lora_A` and `lora_B`.

    ## What to do
    Save the adapter again from the model; compare with `torch.equal`.

    ## Source
    safetensors 0.8.0, `save_file` refuses tensors that share memory for the same reason.
    """
    assert subject.adapter is not None
    seen: dict[bytes, str] = {}
    repeated: dict[str, str] = {}
    for name, update in updates_of(subject.adapter):
        if isinstance(update, LowRank) and update.up.numel and update.down.numel:
            print_ = _print(update)
            if print_ is not None and seen.setdefault(print_, name) != name:
                repeated[name] = seen[print_]
    if repeated:
        yield Hit(first_of(list(repeated)), f"the same values as {next(iter(repeated.values()))}")


@rule("LF408", Severity.INFO, since="0.1.0", slow=True)
def unused_component(subject: Subject) -> Iterator[Hit]:
    """Components of an update are zero: columns of `lora_B` or rows of `lora_A`.

    ## Why it matters
    They do nothing and take up space. An adapter padded to a rank that an engine supports looks like this.

    ## Example
    Rank 16, with 8 all-zero columns of `lora_B`.

    ## What to do
    Nothing, if the padding was intended; otherwise use a lower rank.

    ## Source
    vllm 0.33.0, config/lora.py: ranks of 1, 8, 16, 32, 64, 128, 256, 320 and 512 only.
    """
    assert subject.adapter is not None
    found: dict[str, str] = {}
    for name, update in updates_of(subject.adapter):
        if isinstance(update, LowRank) and len(update.up.shape) == len(update.down.shape) == 2:
            count = _zero_components(update)
            if 0 < count < update.up.shape[1]:
                found.setdefault(name, f"{counted_of(count, update.up.shape[1], 'component')} zero")
    if found:
        yield Hit(first_of(list(found)), next(iter(found.values())))


@rule("LF409", Severity.WARNING, since="0.1.0", slow=True)
def odd_magnitude(subject: Subject) -> Iterator[Hit]:
    """A DoRA magnitude is zero or negative.

    ## Why it matters
    Magnitudes are norms of rows: zero turns an output of the layer off, a negative one flips its sign. Both mean that
    training went wrong, or that the vector was not initialized.

    ## Example
    `lora_magnitude_vector` of zeros.

    ## What to do
    Use an earlier checkpoint, or save the adapter again.

    ## Source
    Liu et al. 2024, arXiv 2402.09353, equation 2.
    """
    assert subject.adapter is not None
    for name, update in updates_of(subject.adapter):
        if isinstance(update, LowRank) and update.magnitude is not None and update.magnitude.vector.dtype.is_floating:
            vector = update.magnitude.vector
            count = sum(int((block <= 0).sum()) for block in blocks(vector))
            if count:
                yield Hit(name, f"{counted_of(count, vector.numel, 'magnitude')} not positive")


@rule("LF410", Severity.WARNING, since="0.1.0", slow=True)
def empty_row(subject: Subject) -> Iterator[Hit]:
    """A row of an embedding table is all zero.

    ## Why it matters
    A token with such a row means nothing to the model, and in the output head it can become the most likely token. New
    rows that were never initialized or trained look like this.

    ## Example
    The last 3 rows of a resized `embed_tokens.weight` are zero.

    ## What to do
    Initialize new rows, for example with the mean of the others, and train them; or drop the tokens if nobody uses
    them.

    ## Source
    transformers 5.23.0, modeling_utils.py `resize_token_embeddings`, `mean_resizing`.
    """
    assert subject.adapter is not None
    for name, update in updates_of(subject.adapter):
        table = update.values if isinstance(update, Rows) else update.value if isinstance(update, Replace) else None
        if table is None or len(table.shape) != 2 or not table.numel or not is_vocabulary_table(name):
            continue
        count = sum(int((~block.any(axis=1)).sum()) for block in blocks(table))
        if 0 < count < table.shape[0]:
            yield Hit(name, f"{counted_of(count, table.shape[0], 'row')} zero")


def _print(update: LowRank) -> bytes | None:
    """A hash of both factors; None where one of them is constant, as before training."""
    import hashlib

    digest = hashlib.sha256()
    for factor in (update.up, update.down):
        is_constant = True
        for block in blocks(factor):
            is_constant = is_constant and bool((block == block.flat[0]).all())
            digest.update(str(factor.shape).encode())
            digest.update(bytes_of(block, factor.dtype))
        if is_constant:
            return None
    return digest.digest()


def _zero_components(update: LowRank) -> int:
    import numpy as np

    if not update.up.numel or not update.down.numel or update.up.shape[1] != update.down.shape[0]:
        return 0
    used = np.zeros(update.up.shape[1], bool)
    for block in blocks(update.up):
        used |= block.any(axis=0)
    rows = np.concatenate([block.any(axis=1) for block in blocks(update.down)])
    return int((~(used & rows)).sum())
