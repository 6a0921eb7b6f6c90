"""Publishes files on the Hub: uploads new ones, has the Hub copy those of a base, and makes one commit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from loraformat._version import __version__
from loraformat.diagnostics import show
from loraformat.errors import StorageError
from loraformat.storage.hub.addresses import BRANCH, Address
from loraformat.storage.hub.background import all_in_background, in_background
from loraformat.storage.hub.connection import Connection, State
from loraformat.storage.hub.faults import as_hub_error
from loraformat.storage.hub.output import HubOutput, WholeCopy
from loraformat.storage.hub.rejections import CopyRejected, as_rejection, patiently
from loraformat.storage.hub.target import OF_THE_HUB, Place, check_stale
from loraformat.storage.local.interrupts import Deferral
from loraformat.storage.publication import Published, Publishing

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_UPLOADS = 4  # at a time
_PATIENCE_S = 600.0  # for a request without files
_MOST_REGULAR_NBYTES = 20 << 20  # of a file that the Hub keeps in git
_CLEANING_S = 60.0
_PROBE = ".loraformat-probe"


@dataclass(frozen=True, slots=True)
class Publisher:
    """The way of one output to its place.

    Attributes:
        wait: how to pass some seconds before a request is made again.
    """

    connection: Connection
    place: Place
    publishing: Publishing
    wait: Callable[[float], None]

    @property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.connection.endpoint, library_name="loraformat", library_version=__version__)

    @property
    def _address(self) -> Address:
        return self.place.address

    def check_access(self) -> None:
        """Raises: StorageError: the token may not write to a repository that is there."""
        if self.place.state is None:
            return
        from huggingface_hub import CommitOperationAdd

        branch = self._address.branch if self.place.has_branch else BRANCH
        probe = CommitOperationAdd(path_in_repo=_PROBE, path_or_fileobj=b"loraformat")
        pull = self.publishing.options.create_pr
        self._ask(
            lambda: self._api.preupload_lfs_files(self._address.repository, [probe], revision=branch, create_pr=pull)
        )

    def publish(self, output: HubOutput, ours: frozenset[str]) -> Published:
        """Make the commit.

        Args:
            ours: files of an earlier output; those that the new one does not have are removed.

        Raises: StorageError: it was not made. A repository or branch that was made for it is removed then.
        """
        names = {*output.collected(), *output.copies}
        check_stale(self.place, names, ours)
        removed = sorted(ours - names)
        made: list[str] = []
        with Deferral() as signals:
            try:
                parent = self._parent(made)
                with signals.delivered():
                    found = self._sent_and_committed(output, removed, parent)
            except BaseException:
                self._undo(made)
                raise
        kept = self.place.files().keys() - names - set(removed) - OF_THE_HUB
        return replace(found, removed=tuple(removed), kept=tuple(sorted(kept)))

    def _sent_and_committed(self, output: HubOutput, removed: Sequence[str], parent: str) -> Published:
        """The commit, once the Hub has all files."""
        additions = self._sent(output.collected())
        sent, copied = _nbytes(output), tuple(sorted(output.copies))
        try:
            found = self._committed(additions, output.copies, removed, parent)
            return replace(found, uploaded=sent, copied=copied)
        except CopyRejected as error:
            reason = error.reason
        fetched = self._fetched(output)
        sent += sum(one.nbytes for one in output.copies.values())
        found = self._committed([*additions, *fetched], {}, removed, parent)
        return replace(found, uploaded=sent, fetched=copied, reason=reason)

    def _ask(self, call: Callable[[], Any], *, again: bool = True) -> Any:  # noqa: ANN401 - of the library's own kinds
        """What a call gives, asked for again where the Hub is busy, and where `again` also where an answer was lost."""
        with as_rejection(str(self._address)):
            return patiently(lambda: in_background(call, _PATIENCE_S), self.wait, again=again)

    def _parent(self, made: list[str]) -> str:
        """The commit on which the output's will stand; repository and branch are made where they are not there.

        Args: made: takes what was made, "repository" or "branch".
        """
        repository, state = self._address.repository, self.place.state
        private = self.publishing.options.private
        if state is None:
            self._ask(lambda: self._api.create_repo(repository, private=private, exist_ok=False), again=False)
            made.append("repository")
        if not self.place.has_branch and self._address.branch != BRANCH:
            self._ask(lambda: self._api.create_branch(repository, branch=self._address.branch), again=False)
            made.append("branch")
        if state is not None:
            return state.commit
        with as_hub_error(str(self._address)):
            return self.connection.state(Address(repository, self._address.revision)).commit

    def _undo(self, made: Sequence[str]) -> None:
        """Remove what was made for a commit that was not made, unless somebody has used it since."""
        address, api = self._address, self._api
        if not made:
            return
        try:
            before = self.place.state
            state = self.connection.state(Address(address.repository, None if before is None else address.revision))
            if before is None and not state.files.keys() - OF_THE_HUB:
                in_background(lambda: api.delete_repo(address.repository, missing_ok=True), _CLEANING_S)
            elif before is not None and state.commit == before.commit:
                in_background(lambda: api.delete_branch(address.repository, branch=address.branch), _CLEANING_S)
        except Exception:  # noqa: BLE001 - the error that led here is the one to tell
            return

    def _sent(self, files: Mapping[str, str]) -> list[Any]:
        """Operations that add files, which are uploaded."""
        from huggingface_hub import CommitOperationAdd

        address = self._address
        with as_rejection(str(address)), _truncated(files):
            additions = [CommitOperationAdd(address.inside(name), path) for name, path in files.items()]
            all_in_background([partial(self._upload, each) for each in additions], _UPLOADS)
        ignored = [each.path_in_repo for each in additions if getattr(each, "_should_ignore", False)]
        if ignored:
            raise StorageError(
                f"the repository's .gitignore excludes {show(ignored[0], 100)}",
                where=str(address),
                hint="remove the line from it, or write to another repository",
            )
        return additions

    def _upload(self, addition: Any) -> None:  # noqa: ANN401 - a CommitOperationAdd
        """Find out how the Hub keeps a file, and upload it where that is outside of git.

        One at a time: for several the library makes threads that no signal ends.
        """
        address, pull = self._address, self.publishing.options.create_pr
        patiently(
            lambda: self._api.preupload_lfs_files(
                address.repository, [addition], revision=address.branch, create_pr=pull, free_memory=False
            ),
            self.wait,
        )

    def _fetched(self, output: HubOutput) -> list[Any]:
        """Operations that add the files that the Hub did not copy: they are fetched, one at a time, and uploaded."""
        additions: list[Any] = []
        for name, copy in sorted(output.copies.items()):
            path = output.fetched(name, copy)
            additions += self._sent({name: path})
            os.truncate(path, 0)
        return additions

    def _copies(self, copies: Mapping[str, WholeCopy]) -> list[Any]:
        """Operations that copy files on the Hub.

        Raises: CopyRejected: this version of the library copies inside one repository only.
        """
        from huggingface_hub import CommitOperationCopy

        found: list[Any] = []
        for name, copy in sorted(copies.items()):
            source = copy.address
            more: dict[str, Any] = {}
            if source.repository.casefold() != self._address.repository.casefold():
                if "src_repo_id" not in {field.name for field in fields(CommitOperationCopy)}:
                    raise CopyRejected("this version of huggingface_hub copies only within one repository")
                more = {"src_repo_id": source.repository, "src_repo_type": "model"}
            target = self._address.inside(name)
            found.append(CommitOperationCopy(source.folder, target, src_revision=source.revision, **more))
        return found

    def _committed(
        self, additions: Sequence[Any], copies: Mapping[str, WholeCopy], removed: Sequence[str], parent: str
    ) -> Published:
        """The commit.

        Raises: StorageError: it was not made, or that is not known. CopyRejected: the Hub does not copy the files.
        """
        from huggingface_hub import CommitOperationDelete

        options, address = self.publishing.options, self._address
        deletions = [CommitOperationDelete(address.inside(name), is_folder=False) for name in removed]
        operations = [*additions, *self._copies(copies), *deletions]
        message = options.commit_message or f"Written by loraformat {__version__}"
        try:
            info = self._ask(
                lambda: self._api.create_commit(
                    address.repository,
                    operations,
                    commit_message=message,
                    revision=address.branch,
                    create_pr=options.create_pr,
                    parent_commit=parent,
                ),
                again=not options.create_pr,
            )
        except StorageError:
            # A commit whose answer was lost is refused as a race with itself.
            state = None if options.create_pr else self._state()
            wanted = {address.inside(name): copy.sha256 for name, copy in copies.items()}
            if state is None or state.commit == parent or not _holds(state, additions, wanted, deletions):
                raise
            url = f"{self.connection.endpoint}/{address.repository}/commit/{state.commit}"
            return Published(str(address.at(state.commit)), url, 0)
        url = info.pr_url if options.create_pr else info.commit_url
        return Published(str(address if options.create_pr else address.at(info.oid)), str(url), 0)

    def _state(self) -> State | None:
        try:
            return self.connection.state(self._address)
        except StorageError:
            return None


def _nbytes(output: HubOutput) -> int:
    return sum(os.path.getsize(path) for path in output.collected().values())


def _holds(state: State, additions: Sequence[Any], copies: Mapping[str, str], deletions: Sequence[Any]) -> bool:
    """Whether a repository has all that a commit was to bring, and nothing that it was to remove."""
    if any(each.path_in_repo in state.files for each in deletions):
        return False
    hashes = {path: (sha256, "") for path, sha256 in copies.items()}
    hashes |= {each.path_in_repo: _hashes(each) for each in additions}
    found = {path: state.files.get(path) for path in hashes}
    return all(
        one is not None and (one.sha256 == hashes[path][0] if one.sha256 else one.blob == hashes[path][1])
        for path, one in found.items()
    )


def _hashes(addition: Any) -> tuple[str, str]:  # noqa: ANN401 - a CommitOperationAdd
    """The SHA-256 of a file, and the name that git has for its bytes where it is small."""
    blob = ""
    if addition.upload_info.size <= _MOST_REGULAR_NBYTES:
        with addition.as_file() as file:
            data = file.read()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - as git names its objects
    return addition.upload_info.sha256.hex(), blob


@contextmanager
def _truncated(files: Mapping[str, str]) -> Iterator[None]:
    """A block whose threads find the files empty when something ends it early, so that they end, too."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            for path in files.values():
                os.truncate(path, 0)
        raise
