"""Which files of an unfinished output are complete, so that an interrupted merge can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from loraformat.containers.prints import header_sha256
from loraformat.errors import LoraFormatError
from loraformat.merger.execute import Written
from loraformat.merger.plan import MergePlan, ShardPlan
from loraformat.merger.retention import Tally
from loraformat.storage.local import OWN_PREFIX, LocalStore

JOURNAL = f"{OWN_PREFIX}journal.json"


def fingerprint_of(plan: MergePlan, identities: Sequence[Any], version: str) -> str:
    """One hash over all that decides about the output's bytes.

    Args:
        identities: of each input, for every file: name, device, inode, size, time of change.
        version: of this package.
    """
    facts = {"version": version, "plan": plan.to_json(), "inputs": identities}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Journal:
    """A file in the unfinished output that lists the complete weight files with their figures."""

    def __init__(self, output: LocalStore, fingerprint: str) -> None:
        self._output, self._fingerprint = output, fingerprint
        self._files: dict[str, Any] = {}

    def resume(self) -> dict[str, Written]:
        """The weight files that need not be written again, by name; everything else in the folder is removed.

        A file counts where this plan wrote it and it is the file that was written: by size, inode, time of change and
        hash of its header.
        """
        self._files = {name: entry for name, entry in self._read().items() if self._is_intact(name, entry)}
        for name in self._output.own_and_other_names():
            if name not in self._files:
                self._output.remove(name)
        self._write()
        return {name: _written(entry) for name, entry in self._files.items()}

    def add(self, shard: ShardPlan, written: Written) -> None:
        """Note that a file is complete."""
        self._files[shard.target] = {
            "identity": list(self._output.identity(shard.target)),
            "header": header_sha256(self._output, shard.target),
            "tallies": {name: asdict(tally) for name, tally in written.tallies.items()},
            "digests": written.digests,
        }
        self._write()

    def _read(self) -> dict[str, Any]:
        if JOURNAL not in self._output.own_and_other_names():
            return {}
        try:
            known = json.loads(self._output.read(JOURNAL))
        except ValueError:
            return {}
        return dict(known["files"]) if known.get("fingerprint") == self._fingerprint else {}

    def _is_intact(self, name: str, entry: Mapping[str, Any]) -> bool:
        try:
            found = list(self._output.identity(name)), header_sha256(self._output, name)
        except LoraFormatError:
            return False
        return found == (entry["identity"], entry["header"])

    def _write(self) -> None:
        data = json.dumps({"fingerprint": self._fingerprint, "files": self._files}).encode()
        with self._output.create(JOURNAL, len(data)) as writer:
            writer.write(data)


def _written(entry: Mapping[str, Any]) -> Written:
    tallies = {name: Tally(**values) for name, values in entry["tallies"].items()}
    return Written(tallies, dict(entry["digests"]))
