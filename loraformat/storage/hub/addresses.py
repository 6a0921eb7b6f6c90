"""hf:// addresses: a repository of models, a revision of it, a folder in it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loraformat.diagnostics import show_address
from loraformat.errors import StorageError

SCHEME = "hf://"
BRANCH = "main"  # what the Hub takes where no revision is named
_URI = re.compile(r"hf://([\w.\-]+/[\w.\-]+)(?:@(refs/[\w.\-]+/[\w.\-]+|[^/@]+))?((?:/[^/]+)*)/?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Address:
    """hf://owner/name[@revision][/folder].

    Attributes:
        repository: "owner/name".
        revision: a branch, tag or commit; None where none is named.
        folder: in the repository, without slashes at its ends; "" for the repository itself.
    """

    repository: str
    revision: str | None = None
    folder: str = ""

    @classmethod
    def parse(cls, uri: str) -> Address:
        """Raises: StorageError: not an address of a repository."""
        found = _URI.fullmatch(uri)
        folder = found[3].strip("/") if found else ""
        if found is None or any(part in (".", "..") for part in [*folder.split("/"), *found[1].split("/")]):
            raise StorageError(
                "not the address of a repository", where=show_address(uri), hint="hf://owner/name[@revision][/folder]"
            )
        return cls(found[1], found[2], folder)

    @property
    def branch(self) -> str:
        """The revision, or the branch that the Hub takes where none is named."""
        return self.revision or BRANCH

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit, which nothing can be added to."""
        return _COMMIT.fullmatch(self.revision or "") is not None

    def at(self, revision: str) -> Address:
        """The same folder at another revision."""
        return Address(self.repository, revision, self.folder)

    def inside(self, path: str) -> str:
        """The path in the repository of a file of the folder."""
        return f"{self.folder}/{path}" if self.folder else path

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        folder = f"/{self.folder}" if self.folder else ""
        return f"{SCHEME}{self.repository}{revision}{folder}"


def normalized(uri: str) -> str:
    """One spelling of an address, to compare it with others: small letters, the branch named, no slash at the end.

    Raises: StorageError: not an address of a repository.
    """
    address = Address.parse(uri)
    return str(Address(address.repository.casefold(), address.branch, address.folder))
