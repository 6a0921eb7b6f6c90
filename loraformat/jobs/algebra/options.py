"""Options of the verbs on factors: ranks, and how the output is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loraformat.algebra.rank_rules import RankRule
from loraformat.diagnostics import Finding
from loraformat.errors import UsageError, require_one_of
from loraformat.formats.kit.scaling import MAX_RANK
from loraformat.model.tensors import DType
from loraformat.storage import Publication

DTYPES = {"float32": DType.F32, "bfloat16": DType.BF16, "float16": DType.F16}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """How an output is written; see `resize`."""

    to: str | None
    container: str | None
    dry_run: bool
    strict: bool
    overwrite: bool
    publication: Publication | None
    announce: Callable[[tuple[Finding, ...]], None] | None
    progress: Callable[[int, int], None] | None


def dtype_of(name: str) -> DType:
    """Raises: UsageError (LF021): not a dtype of factors."""
    require_one_of(name, tuple(DTYPES), "dtype")
    return DTYPES[name]


def checked(rule: RankRule) -> RankRule:
    """The rule. Raises: UsageError (LF021): a bound outside its range, or a size beside another bound."""
    for name, value in (("rank", rule.rank), ("max-rank", rule.max_rank)):
        if value is not None and not 1 <= value <= MAX_RANK:
            raise UsageError(f"expected a rank from 1 to {MAX_RANK}, found {value}", where=f"--{name}")
    shares = (("energy", rule.energy), ("sv-cumulative", rule.sv_cumulative), ("sv-fro", rule.sv_fro))
    for name, share in shares:
        if share is not None and not 0 < share <= 1:
            raise UsageError(f"expected a share above 0 and up to 1, found {share:g}", where=f"--{name}")
    if rule.error is not None and not 0 <= rule.error < 1:
        raise UsageError(f"expected a relative error from 0 to below 1, found {rule.error:g}", where="--error")
    if rule.sv_ratio is not None and not rule.sv_ratio >= 1:
        raise UsageError(f"expected σ₁/σ of 1 or more, found {rule.sv_ratio:g}", where="--sv-ratio")
    if rule.size is not None and rule.size < 1:
        raise UsageError(f"expected a number of bytes, found {rule.size}", where="--size")
    if rule.size is not None and len(rule.names) > 1:
        raise UsageError("--size cannot be combined with other options that set the rank", where="--size")
    return rule


def described(rule: RankRule) -> str:
    """The rule in words: "energy 0.9, at most rank 16"."""
    words = [f"{name.replace('_', '-')} {getattr(rule, name):g}" for name in rule.names]
    if rule.max_rank is not None:
        words.append(f"at most rank {rule.max_rank}")
    return ", ".join(words)
