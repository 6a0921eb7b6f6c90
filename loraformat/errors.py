"""The exceptions. Each class has a code, which is also the code of the finding that `validate` makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraformat.diagnostics import NOWHERE, Finding, FindingLocation, Severity, in_file, show


class LoraFormatError(Exception):
    """An error that the user can fix. Reads `where: message (hint)`; pickles with all its fields.

    Args:
        message: what is wrong, what was expected and what was found; lower case, no full stop.
        where: a location, or as text the URI, option or verb that it is about.
        hint: what to do, only if we know.
    """

    code = "LF000"
    name = "error"

    def __init__(self, message: str, *, where: str | FindingLocation = "", hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint
        self.location = self._location_of(where) if isinstance(where, str) else where

    @staticmethod
    def _location_of(where: str) -> FindingLocation:
        """What a plain text means as the location of this error."""
        return FindingLocation(subject=where)

    @property
    def where(self) -> str:
        """The location as text; may be empty."""
        return str(self.location)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.hint})" if self.hint else text

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.location, self.hint, self._extra())

    def _extra(self) -> dict[str, Any]:
        """Fields of a subclass beyond the three; set again after unpickling."""
        return {}

    def finding(self) -> Finding:
        """The error as an error-level finding.

        >>> import loraformat
        >>> try:
        ...     loraformat.load_adapter("no-such-folder")
        ... except loraformat.LoraFormatError as error:
        ...     print(error.where, error.finding().code)
        no-such-folder LF020
        """
        return Finding(
            code=self.code,
            name=self.name,
            severity=Severity.ERROR,
            location=self.location,
            message=self.message,
            hint=self.hint,
        )


def _rebuild(
    cls: type[LoraFormatError], message: str, where: FindingLocation, hint: str, extra: dict[str, Any]
) -> LoraFormatError:
    error = cls(message, where=where, hint=hint)
    for key, value in extra.items():
        setattr(error, key, value)
    return error


class StorageError(LoraFormatError):
    """A path cannot be read or written, the disk is full, or the output exists.

    ## What to do
    Correct the path or the permissions, free some space, or replace the output with `--overwrite`.
    """

    code, name = "LF020", "storage-error"


class UsageError(LoraFormatError):
    """An option or setting is unknown, out of range, or cannot be read safely.

    ## What to do
    Correct the option; `loraformat VERB --help` lists all of them.
    """

    code, name = "LF021", "usage-error"


class AssumptionContradicted(UsageError):
    """An option contradicts the adapter's own files, for example with another alpha.

    ## Why it matters
    `--alpha` and `--assume` are for values that the files do not state. If the files state the value, one of the two is
    wrong, and the scale of every update depends on it.

    ## Example
    `--alpha 32` for an adapter whose config says `"lora_alpha": 16`.

    ## What to do
    Leave the option out, or correct the file.
    """

    code, name = "LF024", "assumption-contradicted"


def require_one_of(value: object, allowed: Sequence[str], argument: str) -> None:
    """Raises: UsageError (LF021): the value of an argument is not one of those allowed."""
    if value not in allowed:
        raise UsageError(f"expected one of {', '.join(allowed)}, found {show(value, 40)}", where=argument)


class NothingChecked(LoraFormatError):
    """`validate` ran none of its rules, so nothing is known about the adapter.

    ## Why it matters
    Every selected rule needs something that was not given: a base (`--base`), values (`--deep`), a runtime
    (`--target`); or `--select` and `--ignore` leave no rule. A run without rules does not pass: its exit code is 2.

    ## What to do
    Pass what the rules need, or select others: `loraformat explain` lists all codes.
    """

    code, name = "LF022", "nothing-checked"


class OutOfResources(LoraFormatError):
    """The system has no more memory, or cannot start more threads.

    ## What to do
    Use fewer `--jobs` or a smaller `--memory`, or raise the limits of the system or container.
    """

    code, name = "LF023", "out-of-resources"


class EngineError(LoraFormatError):
    """The cluster that `--engine` names cannot be reached, or its workers cannot do the work.

    ## Why it matters
    Nothing was written. If a worker or a node dies, that is not an error: its files are computed again elsewhere.

    ## Example
    `--engine ray=head:6379` where nothing listens at that address, nodes without loraformat or with another version of
    it, or a file for which no node has enough memory.

    ## What to do
    Start the cluster, or leave `--engine` out: threads of this process write the same bytes.
    """

    code, name = "LF025", "engine-error"


class UnsupportedMachine(LoraFormatError):
    """The machine keeps the highest byte of a number first (big-endian), as s390x does.

    ## Why it matters
    Weight files hold the lowest byte first. No result on such a machine was ever compared with one on another, and a
    merge that is wrong in its bytes looks like any other file.

    ## Use instead
    Run loraformat on x86-64 or arm64: it needs the files and no GPU.
    """

    code, name = "LF026", "unsupported-machine"


class ContainerError(LoraFormatError):
    """The bytes are not the container that the file's name or beginning claims.

    ## What to do
    Check that the file is what its name says, and download or save it again.
    """

    code, name = "LF001", "not-a-container"

    @staticmethod
    def _location_of(where: str) -> FindingLocation:
        return in_file(where) if where else NOWHERE


class InvalidHeader(ContainerError):
    """A safetensors header or zip directory violates its specification.

    ## Why it matters
    A loader that is less strict would read wrong values, or read outside of the file.

    ## What to do
    Download the file again, or save it again with the safetensors library or `torch.save`.
    """

    code, name = "LF003", "invalid-header"


class TruncatedFile(ContainerError):
    """A file ends before the end that its header states.

    ## Why it matters
    The download or copy ended early, or the disk was full.

    ## What to do
    Download or copy the file again.
    """

    code, name = "LF004", "truncated-file"

    def __init__(self, message: str, *, where: str | FindingLocation = "", hint: str = "") -> None:
        super().__init__(message, where=where, hint=hint or "the download or copy ended early; fetch the file again")


class NotATensorFile(ContainerError):
    """A weight file is something else: an archive, a GGUF file, a text.

    ## Why it matters
    The file was renamed, or a download put something else in its place.

    ## What to do
    The hint names what the file is: rename it, unpack it, or download the weights again.
    """

    code, name = "LF002", "not-a-tensor-file"


class GitLfsPointer(NotATensorFile):
    """A weight file is a Git-LFS pointer: the repository was cloned without its large files.

    ## What to do
    Run `git lfs pull` in the clone; in GitHub Actions set `lfs: true` for actions/checkout.
    """

    code, name = "LF006", "git-lfs-pointer"


class WebPage(NotATensorFile):
    """A weight file is an HTML page: a login or error page was saved instead of the download.

    ## What to do
    Log in if the repository needs it, and download the file again.
    """

    code, name = "LF008", "web-page"


class InvalidJson(ContainerError):
    """The text is not strict JSON: bad syntax, duplicate keys, NaN, too deep, too large, wrong encoding.

    ## Why it matters
    A file that programs read differently, because of duplicate keys for example, gives different adapters in different
    programs.

    ## What to do
    Correct the file at the line and column of the message.
    """

    code, name = "LF005", "invalid-json"


class InvalidYaml(ContainerError):
    """The text is not YAML of plain values: bad syntax, tags, anchors, repeated keys, too deep, too large.

    ## What to do
    Correct the file at the line of the message; use plain values only.
    """

    code, name = "LF009", "invalid-yaml"


class UnsafePickle(ContainerError):
    """A pickle holds more than torch.save writes for a dict of tensors. It was not executed.

    ## Why it matters
    Unpickling such a file runs code that its author chose. loraformat interprets only the few opcodes that tensors
    need.

    ## What to do
    Save the state dict with `torch.save`, or better as safetensors, in the program that wrote the file.
    """

    code, name = "LF007", "unsafe-pickle"


class FormatError(LoraFormatError):
    """The files cannot be read as an adapter of their format.

    ## What to do
    The message names the file and the fault. Download or save the adapter again if files are missing.
    """

    code, name = "LF012", "format-error"


class UnknownFormat(FormatError):
    """No format recognizes the files.

    ## Why it matters
    Without a format, loraformat does not know what the tensor names mean.

    ## What to do
    Check the path. Name the format with `--from`; for a state dict of your own code see docs/formats/dump.md.
    """

    code, name = "LF010", "unknown-format"


class AmbiguousFormat(FormatError):
    """Several formats recognize the files equally well.

    ## What to do
    Choose one with `--from`.
    """

    code, name = "LF011", "ambiguous-format"


class MissingFile(FormatError):
    """A file that the format requires is missing.

    ## What to do
    Copy the file from where the rest comes from; the hint says what works without it.
    """

    code, name = "LF101", "missing-file"


class ConfigError(FormatError):
    """A config that lacks something necessary, or contradicts another file."""

    code, name = "LF103", "config-error"


class UnsupportedUpdate(FormatError):
    """A kind of update that this version cannot read, write or merge; the message names it.

    ## Why it matters
    Approximating or skipping the update would give a different model, so loraformat stops instead.

    ## What to do
    The hint says what works instead. docs/formats lists what each format supports.
    """

    code, name = "LF013", "unsupported-update"


class MissingExtra(LoraFormatError):
    """An optional library that this operation needs is not installed.

    ## What to do
    Run the `pip install` command of the hint.
    """

    code, name = "LF029", "missing-extra"


class AdapterRefused(LoraFormatError):
    """An adapter has findings of level error, so the verb does not use it.

    ## Why it matters
    The result would be wrong, or nobody could know what it is.

    ## What to do
    Run `loraformat validate` for all findings. `--force` downgrades those about config and metadata to warnings.
    """

    code, name = "LF800", "adapter-refused"

    def __init__(
        self,
        message: str,
        *,
        where: str | FindingLocation = "",
        hint: str = "",
        findings: tuple[Finding, ...] = (),
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.findings = findings

    def _extra(self) -> dict[str, Any]:
        return {"findings": self.findings}


class RoundTripFailed(AdapterRefused):
    """The output does not read back equal to its source (`--check-roundtrip`). This is a bug; the output was not kept.

    ## What to do
    Please report it, with the command and the names in the message.
    """

    code, name = "LF710", "round-trip-failed"


class MergeError(LoraFormatError):
    """The merge is impossible, or its result would not be right.

    ## What to do
    The message names the weight and the reason, and the hint what to do. Nothing was written.
    """

    code, name = "LF801", "merge-error"


class UnmatchedUpdate(MergeError):
    """An update without a matching tensor in the base."""

    code, name = "LF301", "absent-module"


class ShapeMismatch(MergeError):
    """An update whose shape differs from that of its base weight."""

    code, name = "LF302", "shape-mismatch"


class NonFiniteValue(MergeError):
    """NaN or infinity in an adapter, or in a result where the base had none."""

    code, name = "LF402", "non-finite-value"
