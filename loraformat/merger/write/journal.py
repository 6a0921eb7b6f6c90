"""Which files of an unfinished output are complete, so that an interrupted merge can go on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from typing import Any

from loraformat.containers import strict_json
from loraformat.errors import LoraFormatError
from loraformat.merger.plan.data import MergePlan
from loraformat.merger.write.file_tasks import Receipt, receipt_of
from loraformat.merger.write.weights import Written
from loraformat.model.bundle import Json
from loraformat.storage import MARKER, OWN_PREFIX, Output, digest_of, digest_of_range, uncovered

JOURNAL = f"{OWN_PREFIX}journal.json"
_MOST_NBYTES = 1 << 30

Map = Callable[[Callable[[str], Any], Iterable[str]], Iterable[Any]]


def run_fingerprint(plan: MergePlan, identities: Sequence[Any], version: str, processor: str = "cpu") -> str:
    """One hash over all that decides about the output's bytes.

    Args:
        identities: of each input, for every file: name, inode, size, times of change; or where it is, with its commit.
        version: of this package.
        processor: see `Resources.processor`.
    """
    facts = {"version": version, "processor": processor, "plan": plan.to_json(), "inputs": identities}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Journal:
    """A file in the unfinished output that lists the complete weight files with their figures and digests.

    It is always written: whether a run is killed is not known when it begins.
    """

    def __init__(self, output: Output, fingerprint: str) -> None:
        self._output, self._fingerprint = output, fingerprint
        self._files: dict[str, Any] = {}

    def begin(self) -> None:
        """Begin again in an empty folder."""
        self._files = {}
        self._write()

    def resume(self, each: Map = map) -> dict[str, Written]:
        """The weight files that need not be written again, by name; everything else in the folder is removed.

        A file is taken over where this plan wrote it and digests in the journal prove every byte of it. A journal that
        is damaged, or another plan's, proves nothing.

        Args:
            each: maps a function over names, to read several files at a time.
        """
        known = self._read()
        names = list(known)
        proofs = each(lambda name: is_proved(self._output, name, known[name]), names)
        there = {name: known[name] for name, is_proved in zip(names, proofs, strict=True) if is_proved}
        self._files = {name: receipt_of(name, written).to_json() for name, written in there.items()}
        for name in self._output.names():
            if name not in there and name != MARKER:
                self._output.remove(name)
        self._write()
        return there

    def add(self, target: str, written: Written) -> None:
        """Note that a file is complete."""
        self._files[target] = receipt_of(target, written).to_json()
        self._write()

    def _read(self) -> dict[str, Written]:
        if JOURNAL not in self._output.names():
            return {}
        try:
            known = strict_json.parse(self._output.read(JOURNAL), JOURNAL, limit=_MOST_NBYTES)
            if not isinstance(known, dict) or known != _signed(self._fingerprint, known["files"]):
                return {}
            return _receipts(known["files"])
        except (LoraFormatError, LookupError, TypeError, ValueError, AttributeError):
            return {}

    def _write(self) -> None:
        data = json.dumps(_signed(self._fingerprint, self._files)).encode()
        with self._output.create(JOURNAL, len(data)) as writer:
            writer.write(data)


def _signed(fingerprint: str, files: Any) -> dict[str, Any]:  # noqa: ANN401 - as it was read
    """The journal's values with a digest of themselves: figures of complete files are not measured again."""
    values = {"fingerprint": fingerprint, "files": files}
    return {**values, "digest": digest_of(json.dumps(values, sort_keys=True).encode())}


def _receipts(files: Json) -> dict[str, Written]:
    receipts = [Receipt.from_json(entry) for entry in dict(files).values()]  # type: ignore[arg-type]
    return {receipt.target: figures_of(receipt) for receipt in receipts}


def is_proved(output: Output, name: str, written: Written) -> bool:
    """Whether digests cover all of a file, and are those of the bytes in it."""
    runs = written.runs[name]
    try:
        if (is_proved := output.proves(name)) is not None:
            return is_proved
        nbytes = output.size(name) if output.is_own(name) else -1
        is_covered = nbytes >= 0 and not uncovered([(run.offset, run.end) for run in runs], nbytes)
        return is_covered and all(
            run.end <= nbytes and digest_of_range(output, name, run.offset, run.nbytes) == run.digest for run in runs
        )
    except LoraFormatError:
        return False


def figures_of(receipt: Receipt) -> Written:
    """A receipt as figures. Raises ValueError: they are not those of a file."""
    if any(offset < 0 or nbytes < 0 for offset, nbytes, _ in receipt.runs):
        raise ValueError(receipt.target)
    if not all(0 <= abs(figure) < math.inf for tally in receipt.tallies.values() for figure in astuple(tally)):
        raise ValueError(receipt.target)
    if any(tally.whole < 0 for tally in receipt.tallies.values()):
        raise ValueError(receipt.target)
    return receipt.written()
