"""Receipts of ranks: what each process of a divided run has written, stored next to its files for `--finish`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loraformat._version import __version__
from loraformat.containers import strict_json
from loraformat.diagnostics import listed, show
from loraformat.errors import LoraFormatError, MergeError, StorageError
from loraformat.merger.plan.data import MergePlan
from loraformat.merger.write.file_tasks import Receipt, receipt_of
from loraformat.merger.write.journal import figures_of, is_proved
from loraformat.merger.write.weights import Written
from loraformat.model.bundle import OpenedFiles
from loraformat.storage import OWN_PREFIX, Output, Source, digest_of, identity_anywhere

SCHEMA = "loraformat.rank-receipt/1"
_PREFIX, _SUFFIX = f"{OWN_PREFIX}rank-", ".json"
_MOST_NBYTES = 1 << 28
_AGAIN = "run it again"
# Processes that write one output: more than any cluster has.
MOST_WORLD = 100_000

Map = Callable[[Callable[[str], Any], Iterable[str]], Iterable[Any]]
# What decides about the bytes of an output, by what a user calls it.
Facts = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """A receipt as it lies in the output.

    Attributes:
        rank, world: of the process that wrote the file.
        processor: what computed it; see `Resources.processor`.
        written: figures of the file.
        identity: what its store called the file when it was written; empty where that is not known yet.
    """

    rank: int
    world: int
    processor: str
    written: Written
    identity: tuple[str | int, ...]


def facts_of(plan: MergePlan, base: tuple[OpenedFiles, Sequence[str]], adapters: Sequence[Any], digests: str) -> Facts:
    """All that decides about the bytes of an output, the same on every machine that sees the same files.

    Where inputs lie is left out: what they are is in it, by size and time of change, or as their store has it, and by
    the hashes of headers in the plan.

    Args:
        base, adapters: (store, names of the files that are used).
        digests: which digests are made.
    """
    plain = plan.to_json()
    options = {key: plain.pop(key) for key in ("arithmetic", "files", "quantized")}
    base_files = plain.pop("base_files")
    del plain["base"]
    sources = [{key: value for key, value in one.items() if key != "uri"} for one in plain.pop("adapters")]
    return {
        "the version of loraformat": __version__,
        "the base": _hash([base_files, _identities(*base)]),
        "the adapters": _hash([sources, [_identities(*one) for one in adapters]]),
        "the options": _hash([options, digests]),
        "the plan": _hash(plain),
    }


def word_of(facts: Facts) -> str:
    """The word under which all processes of a run find their unfinished output; see `storage.join`."""
    return _hash(dict(facts))


def receipt_name(target: str) -> str:
    """The name of the receipt of a weight file."""
    return f"{_PREFIX}{target}{_SUFFIX}"


class Receipts:
    """The receipts in an unfinished output.

    Args:
        facts: what this process was given, see `facts_of`.
    """

    def __init__(self, output: Output, facts: Facts) -> None:
        self._output, self._facts = output, dict(facts)

    def add(self, target: str, written: Written, rank: int, world: int, processor: str = "cpu") -> None:
        """Leave a receipt of a file that is complete."""
        values = {
            "schema": SCHEMA,
            "facts": self._facts,
            "rank": rank,
            "world": world,
            "processor": processor,
            "identity": list(_identity(self._output, target)),
            "receipt": receipt_of(target, written).to_json(),
        }
        data = json.dumps({**values, "digest": _digest(values)}).encode()
        with self._output.create(receipt_name(target), len(data)) as writer:
            writer.write(data)

    def known(self, targets: Iterable[str], each: Map = map, processor: str = "cpu") -> dict[str, Written]:
        """The files that need not be written again, by name: those that a processor of the same kind computed."""
        names = set(self._output.names())
        found: dict[str, Entry] = {}
        for target in targets:
            if {target, receipt_name(target)} <= names:
                try:
                    found[target] = self._read(target)
                except MergeError:
                    continue
        found = {target: entry for target, entry in found.items() if entry.processor == processor}
        sound = each(lambda name: self._is_sound(name, found[name]), found)
        return {name: found[name].written for name, is_sound in zip(found, sound, strict=True) if is_sound}

    def all_of(self, targets: Sequence[str], shares: Callable[[int], Sequence[Sequence[str]]]) -> dict[str, Entry]:
        """The receipts of all files.

        Args: shares: number of ranks → the files of each.

        Raises: MergeError (LF801): one is missing, damaged, or of another run; or some were computed on another kind
            of processor than others.
        """
        names = set(self._output.names())
        found = {target: self._read(target) for target in targets if receipt_name(target) in names}
        missing = [target for target in targets if target not in found or target not in names]
        if missing:
            world = next((entry.world for entry in found.values()), 0)
            ranks = [n for n, share in enumerate(shares(world)) if not set(share).isdisjoint(missing)] if world else []
            who = f"rank {', '.join(map(str, ranks))} of {world} has" if ranks else "its rank has"
            left = f"{len(missing)} of {len(targets)} weight files are missing: {listed(missing)}"
            raise MergeError(f"{who} not written all of its share; {left}", where=self._where, hint=_AGAIN)
        kinds = sorted({entry.processor for entry in found.values()})
        if len(kinds) > 1:
            text = f"the ranks ran on {listed(kinds)}, whose sums may differ in the last bit"
            raise MergeError(text, where=self._where, hint="run all ranks with the same --device")
        return found

    def check_bytes(self, entries: Mapping[str, Entry], each: Map = map) -> None:
        """Raises: MergeError (LF801): a file holds other bytes than its rank wrote."""
        for target, is_sound in zip(
            entries, each(lambda name: self._is_sound(name, entries[name]), entries), strict=True
        ):
            if not is_sound:
                rank, world = entries[target].rank, entries[target].world
                text = (
                    f"the file was modified after rank {rank} of {world} wrote it, and there are no digests "
                    "to check its bytes"
                )
                raise MergeError(text, where=target, hint=f"remove it and run rank {rank} again")

    @property
    def _where(self) -> str:
        return self._output.uri

    def _is_sound(self, target: str, entry: Entry) -> bool:
        """Whether nobody touched a file since its rank wrote it, or its digests prove all of its bytes.

        A store of objects knows by itself.
        """
        proves = self._output.proves(target)
        if proves is not None:
            return proves and (not entry.identity or _identity(self._output, target) == entry.identity)
        if not entry.identity or _identity(self._output, target) == entry.identity:
            return True
        return is_proved(self._output, target, entry.written)

    def _read(self, target: str) -> Entry:
        """Raises: MergeError (LF801): a receipt is damaged, or of another run."""
        name = receipt_name(target)
        try:
            value = read_receipt(self._output, name)
            receipt = Receipt.from_json(value["receipt"])
            figures = figures_of(receipt)
            rank, world = _share_of(value)
            entry = Entry(rank, world, str(value["processor"]), figures, tuple(value["identity"]))
        except StorageError:
            raise
        except (LoraFormatError, LookupError, TypeError, ValueError, AttributeError):
            raise MergeError("the receipt is damaged", where=name, hint=f"remove it; {_AGAIN}: its rank") from None
        if value["facts"] != self._facts or receipt.target != target:
            raise MergeError(
                f"the receipt is of another run: {differences(value['facts'], self._facts)}",
                where=name,
                hint="run every rank, and --finish, with the same inputs and options",
            )
        return entry


def read_receipt(store: Source, name: str) -> dict[str, Any]:
    """A receipt as it was written. Raises: LoraFormatError, ValueError, LookupError, TypeError: it is not."""
    if store.size(name) > _MOST_NBYTES:
        raise ValueError(name)
    value = strict_json.parse(store.read(name), name, limit=_MOST_NBYTES)
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise ValueError(name)
    stated = value.pop("digest")
    if stated != _digest(value) or not isinstance(value["facts"], dict):
        raise ValueError(name)
    return value


def facts_in(store: Output) -> Iterator[Facts]:
    """What the ranks that wrote an unfinished output were given, by each receipt that can be read."""
    for name in store.names():
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
            with suppress(LoraFormatError, LookupError, TypeError, ValueError, AttributeError):
                yield dict(read_receipt(store, name)["facts"])


def differences(theirs: object, ours: Facts) -> str:
    """In what two runs differ, in words."""
    known = theirs if isinstance(theirs, dict) else {}
    found = [name for name, value in ours.items() if known.get(name) != value]
    version = "the version of loraformat"
    if version in found:
        return f"loraformat {show(known.get(version), 30)} wrote it, this is {ours[version]}"
    return f"{' and '.join(found) or 'the inputs or options'} differed"


def _identities(store: OpenedFiles, names: Sequence[str]) -> list[Any]:
    return [[name, *identity_anywhere(store, name)] for name in names]


def _identity(output: Output, target: str) -> tuple[str | int, ...]:
    """Empty where the store cannot tell before the file is complete for all."""
    try:
        return tuple(output.identity(target))
    except StorageError:
        return ()


def _hash(value: Any) -> str:  # noqa: ANN401 - JSON values
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest(values: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(values, sort_keys=True).encode())


def _share_of(value: Mapping[str, Any]) -> tuple[int, int]:
    """The rank and the world of a receipt. Raises: ValueError: not such numbers."""
    rank, world = value["rank"], value["world"]
    if type(rank) is not int or type(world) is not int or not 0 <= rank < world <= MOST_WORLD:
        raise ValueError
    return rank, world
