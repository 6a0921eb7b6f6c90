"""The one exception tree. Every class has a code, and it is the code of the finding that `validate` makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraformat.diagnostics import NOWHERE, Finding, FindingLocation, Severity, in_file, show


class LoraFormatError(Exception):
    """Something that the user can mend. Reads `where: message (hint)`; pickles with all its fields.

    Args:
        message: what is wrong, what was expected and what was found; lower case, no full stop.
        where: a location, or as text what is meant by it: a URI, an option, the verb.
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
    """A path that cannot be read or written, no space, an output that exists."""

    code, name = "LF020", "storage-error"


class UsageError(LoraFormatError):
    """An option or a setting of the caller that names nothing, is out of its range, or cannot be read safely."""

    code, name = "LF021", "usage-error"


class AssumptionContradicted(UsageError):
    """An option of the caller and the adapter's own files say different things, such as two values of alpha.

    ## Why it matters
    `--alpha` and `--assume` fill gaps. If the files state the value themselves, one of the two is wrong, and the scale
    of every update depends on it.

    ## Example
    `--alpha 32` for an adapter whose config says `"lora_alpha": 16`.

    ## Use instead
    Leave the option out, or correct the file.
    """

    code, name = "LF024", "assumption-contradicted"


def require_one_of(value: object, allowed: Sequence[str], argument: str) -> None:
    """Raises: UsageError (LF021): the value of an argument is not one of those allowed."""
    if value not in allowed:
        raise UsageError(f"expected one of {', '.join(allowed)}, found {show(value, 40)}", where=argument)


class NothingChecked(LoraFormatError):
    """`validate` ran none of its rules, so that nothing is known about the adapter.

    ## Why it matters
    Every rule that was selected needs something that was not given: a base (`--base`), values (`--deep`), a runtime
    (`--target`); or `--select` and `--ignore` leave no rule. A run without a rule does not pass: its exit code is 2.

    ## Use instead
    Give what the rules need, or select others: `loraformat explain` lists all codes.
    """

    code, name = "LF022", "nothing-checked"


class OutOfResources(LoraFormatError):
    """The system gives no more memory, or no more threads."""

    code, name = "LF023", "out-of-resources"


class EngineError(LoraFormatError):
    """The cluster that `--engine` names is not there, or its workers cannot do the work.

    ## Why it matters
    Nothing was written. A worker or a node that dies is not an error: its files are made again elsewhere.

    ## Example
    `--engine ray=head:6379` where nothing listens at that address, nodes without loraformat or with another version of
    it, or a file for which no node has enough memory.

    ## Use instead
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
    """Bytes that are not the container which they claim to be."""

    code, name = "LF001", "not-a-container"

    @staticmethod
    def _location_of(where: str) -> FindingLocation:
        return in_file(where) if where else NOWHERE


class InvalidHeader(ContainerError):
    """A safetensors header or zip directory that breaks a rule of its format."""

    code, name = "LF003", "invalid-header"


class TruncatedFile(ContainerError):
    """A file that ends before its header says."""

    code, name = "LF004", "truncated-file"

    def __init__(self, message: str, *, where: str | FindingLocation = "", hint: str = "") -> None:
        super().__init__(message, where=where, hint=hint or "the download or copy ended early: get the file again")


class NotATensorFile(ContainerError):
    """Another kind of file under a weight file's name: an archive, a GGUF file, a text."""

    code, name = "LF002", "not-a-tensor-file"


class GitLfsPointer(NotATensorFile):
    """A Git-LFS pointer under the name of the file that it stands for: the large files of a clone were not fetched."""

    code, name = "LF006", "git-lfs-pointer"


class WebPage(NotATensorFile):
    """An HTML page under a weight file's name: a login or error page was saved instead of the download."""

    code, name = "LF008", "web-page"


class InvalidJson(ContainerError):
    """Text that is not strict JSON: syntax, duplicate keys, NaN, depth, size, encoding."""

    code, name = "LF005", "invalid-json"


class InvalidYaml(ContainerError):
    """Text that is no YAML of plain values: syntax, tags, anchors, repeated keys, depth, size."""

    code, name = "LF009", "invalid-yaml"


class UnsafePickle(ContainerError):
    """A pickle with anything beyond what torch.save writes for a dict of tensors. It was not executed."""

    code, name = "LF007", "unsafe-pickle"


class FormatError(LoraFormatError):
    """Files that cannot be read as an adapter of their format."""

    code, name = "LF012", "format-error"


class UnknownFormat(FormatError):
    """No format recognises the files."""

    code, name = "LF010", "unknown-format"


class AmbiguousFormat(FormatError):
    """Several formats recognise the files with equal right."""

    code, name = "LF011", "ambiguous-format"


class MissingFile(FormatError):
    """A file that the format requires is absent."""

    code, name = "LF101", "missing-file"


class ConfigError(FormatError):
    """A config that does not say what is needed, or contradicts another file."""

    code, name = "LF103", "config-error"


class UnsupportedUpdate(FormatError):
    """A kind of update that this version cannot read, write or merge: refused by name."""

    code, name = "LF013", "unsupported-update"


class MissingExtra(LoraFormatError):
    """A library that only this needs is not installed."""

    code, name = "LF029", "missing-extra"


class AdapterRefused(LoraFormatError):
    """An adapter with error-level findings, in a verb that would use it."""

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
    """What was written does not read back as what it was made of (`--check-roundtrip`): a bug, and nothing is kept."""

    code, name = "LF710", "round-trip-failed"


class MergeError(LoraFormatError):
    """A merge that cannot be done, or that would not be right."""

    code, name = "LF801", "merge-error"


class UnmatchedUpdate(MergeError):
    """An update that lands on no tensor of the base."""

    code, name = "LF301", "absent-module"


class ShapeMismatch(MergeError):
    """An update whose shape is not that of its base weight."""

    code, name = "LF302", "shape-mismatch"


class NonFiniteValue(MergeError):
    """NaN or infinity in an adapter, or in a result where the base had none."""

    code, name = "LF402", "non-finite-value"
