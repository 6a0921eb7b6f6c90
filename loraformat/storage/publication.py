"""How an output is uploaded to the Hub, and the result."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from loraformat.diagnostics import show
from loraformat.errors import UsageError

_LONGEST_MESSAGE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """How an output is uploaded to the Hub (`hf://owner/name[@branch]`); every verb that writes accepts one.

    >>> import loraformat
    >>> loraformat.Publication(private=True, commit_message="v2").card
    True

    Attributes:
        private: make a new repository private.
        create_pr: open a pull request instead of committing to the main branch.
        commit_message: first line of the commit message; None for one that names loraformat.
        card: also write a model card, README.md.
    """

    private: bool = False
    create_pr: bool = False
    commit_message: str | None = None
    card: bool = True

    def options(self) -> tuple[str, ...]:
        """The options of the command line that were given."""
        given = {
            "--private": self.private,
            "--create-pr": self.create_pr,
            "--commit-message": self.commit_message is not None,
            "--no-card": not self.card,
        }
        return tuple(name for name, is_given in given.items() if is_given)


@dataclass(frozen=True, slots=True)
class Published:
    """What a commit did.

    Attributes:
        address: hf://owner/name@commit; of a pull request, that of its branch is not known before it is merged.
        url: of the commit or the pull request, for a browser.
        uploaded: bytes of the files that were sent.
        copied: files that the Hub copied from the base.
        fetched: files that the Hub could have copied and did not, so that their bytes passed through this machine.
        reason: why not.
        removed: files of an earlier output of this package that the new one does not have.
        kept: files of others that stay.
    """

    address: str
    url: str
    uploaded: int
    copied: tuple[str, ...] = ()
    fetched: tuple[str, ...] = ()
    reason: str = ""
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Publishing:
    """A publication with what the run knows.

    Attributes:
        names: of the files that it will write, as far as known.
        on_published: called when the commit is made.
        on_opened: called before anything is computed, with what gives the content of a file that is in the place of the
            output now; None where there is none.
    """

    options: Publication
    names: Collection[str] = ()
    on_published: Callable[[Published], None] | None = None
    on_opened: Callable[[Callable[[str], bytes | None]], None] | None = None


def check_publication(options: Publication, *, is_hub: bool) -> None:
    """Raises: UsageError: options of the Hub for another kind of output, or a commit message without text."""
    given = options.options()
    if given and not is_hub:
        verb = "is" if len(given) == 1 else "are"
        raise UsageError(
            f"{', '.join(given)} {verb} only for outputs on the Hub", where="-o", hint="use -o hf://owner/name"
        )
    message = options.commit_message
    if message is not None and (not message.strip() or len(message) > _LONGEST_MESSAGE):
        raise UsageError(
            f"expected a message of 1 to {_LONGEST_MESSAGE} characters, found {show(message, 40) or 'none'}",
            where="--commit-message",
        )
