"""The commit and the card of an output on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from loraformat.diagnostics import Finding, FindingLocation
from loraformat.jobs.card.facts import Origin, facts_of, name_of
from loraformat.merger.plan.findings import copies_refused, kept_files, published, replaced
from loraformat.model.bundle import CARD
from loraformat.storage import Output, Publication, Published, Publishing, check_publication, is_hub

Meet = Callable[[tuple[Finding, ...]], None]


def publishing_of(
    publication: Publication | None, out: str, meet: Meet, names: Collection[str] = ()
) -> Publishing | None:
    """How an output gets onto the Hub; None for an output that does not.

    Args:
        meet: called with what is found about it.
        names: of the files that it will have, as far as known.

    Raises: UsageError: options for the Hub, and another output.
    """
    chosen = publication or Publication()
    check_publication(chosen, is_hub=is_hub(out))
    if not is_hub(out):
        return None
    check = partial(_check_previous, out) if chosen.card else None
    return Publishing(chosen, names, lambda found: meet(_findings(found, out)), check)


def _check_previous(out: str, previous: Callable[[str], bytes | None]) -> None:
    """Raises: as `write_card`, for the card that is there now."""
    from loraformat.jobs.card.text import check_fields, decoded

    before = previous(CARD)
    if before is not None:
        check_fields(decoded(before, f"{out}/{CARD}"))


def _findings(found: Published, out: str) -> tuple[Finding, ...]:
    where = FindingLocation(subject=out)
    several = [published(where, found.url, found.uploaded, found.copied)]
    if found.fetched:
        several.append(copies_refused(where, found.fetched, found.reason))
    if found.removed:
        several.append(replaced(where, found.removed))
    if found.kept:
        several.append(kept_files(where, found.kept))
    return tuple(several)


def write_card(output: Output, out: str, publishing: Publishing | None, origin: Callable[[], Origin]) -> None:
    """Write the card of an output on the Hub; where none is wanted, leave the one that is there alone.

    Args:
        origin: what the run knows of it.

    Raises: InvalidYaml (LF009): the front matter of the card that is there cannot be read. ConfigError (LF103): it has
        a field that the Hub does not take. StorageError: it is too large, or not UTF-8.
    """
    if publishing is None:
        return
    from loraformat.jobs.card.text import check_fields, decoded, rendered
    from loraformat.storage.hub import HubOutput

    assert isinstance(output, HubOutput)
    if not publishing.options.card:
        if output.replaces(CARD):
            output.remove(CARD)  # the base's, in whose place somebody has one
        return
    before = output.previous(CARD)
    text = rendered(
        facts_of(output, origin()), name_of(out), None if before is None else decoded(before, f"{out}/{CARD}")
    )
    check_fields(text)
    data = text.encode("utf-8")
    with output.create(CARD, len(data)) as writer:
        writer.write(data)
