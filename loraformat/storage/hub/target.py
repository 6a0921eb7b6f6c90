"""The target of an output on the Hub, checked before anything is computed: write access and existing files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from loraformat import strict_json
from loraformat.diagnostics import show
from loraformat.errors import InvalidJson, StorageError, UsageError
from loraformat.storage.hub.addresses import BRANCH, SCHEME, Address
from loraformat.storage.hub.connection import Connection, ListedFile, State, check_status, state_of
from loraformat.storage.hub.faults import refusal
from loraformat.storage.local.store import WEIGHT_SUFFIXES
from loraformat.storage.publication import Publication

# What every repository has from the first moment on.
OF_THE_HUB = frozenset([".gitattributes"])
_CARD = "README.md"  # in which people write
_WEIGHTS = (*WEIGHT_SUFFIXES, ".index.json")
_MOST_ANSWER_NBYTES = 1 << 20
_OTHER_BRANCH = "use hf://owner/name@branch to write to another branch; git keeps the previous files"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an output will be, and what is there now.

    Attributes:
        state: of the branch, or of the main branch where the branch is not there; None where the repository is not.
        has_branch: whether the branch is there.
    """

    address: Address
    state: State | None
    has_branch: bool

    def files(self) -> Mapping[str, ListedFile]:
        """The files of the folder, by their names in it; those below it included."""
        if self.state is None:
            return {}
        prefix = self.address.inside("")
        return {name.removeprefix(prefix): one for name, one in self.state.files.items() if name.startswith(prefix)}


def parsed(target: str, options: Publication, *, resume: bool) -> Address:
    """The address of an output.

    Raises: StorageError: not one that can be written. UsageError: options that it lacks.
    """
    address = Address.parse(target)
    if address.is_commit or address.branch.startswith("refs/"):
        what = "a commit" if address.is_commit else show(address.branch, 60)
        hint = "name a branch: hf://owner/name@branch"
        if address.branch.startswith("refs/pr/"):
            hint = "--create-pr opens a pull request of its own"
        raise StorageError(f"{what} cannot be written to", where=target, hint=hint)
    if resume:
        hint = "leave --resume out, or write a folder and upload it with `hf upload`"
        raise UsageError("an interrupted output on the Hub cannot be continued", where="--resume", hint=hint)
    if options.create_pr and address.branch != BRANCH:
        raise UsageError("the Hub takes pull requests to the main branch only", where="--create-pr")
    return address


def look(connection: Connection, address: Address) -> Place:
    """What is at an address. Raises: StorageError: it cannot be seen."""
    answer = connection.ask(address)
    if 200 <= answer.status < 300:
        return Place(address, state_of(answer), has_branch=True)
    if answer.headers.get("x-error-code") == "RevisionNotFound":
        return Place(address, connection.state(Address(address.repository)), has_branch=False)
    if answer.status == 404 or answer.headers.get("x-error-code") == "RepoNotFound":
        return Place(address, None, has_branch=False)
    raise refusal(answer.status, answer.headers, address.repository)


def check_owner(connection: Connection, place: Place, options: Publication) -> None:
    """Raises: StorageError: the token is missing, expired or may only read, or the owner is somebody else."""
    from huggingface_hub import get_token

    if get_token() is None:
        hint = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"
        raise StorageError("writing to the Hub needs an access token", hint=hint)
    answer = connection.client.get(f"{connection.endpoint}/api/whoami-v2", {}, most=_MOST_ANSWER_NBYTES)
    check_status(answer, place.address.repository)
    try:
        value = strict_json.parse(answer.body, "the Hub's answer", limit=_MOST_ANSWER_NBYTES)
    except InvalidJson as error:
        raise StorageError(f"the Hub's answer is not valid JSON: {error.message}") from error
    if _role(value) == "read":
        hint = "create one with write access on https://huggingface.co/settings/tokens"
        raise StorageError("the access token is read-only", hint=hint)
    if place.state is not None and options.private and not place.state.is_private:
        hint = "first make it private in its settings, or use another one"
        raise StorageError("the repository exists and is public; --private does not change that", hint=hint)
    owner, owners = place.address.repository.partition("/")[0], _owners(value)
    if place.state is None and options.create_pr:
        raise StorageError("there is no repository to open a pull request in", hint="leave --create-pr out")
    if place.state is None and owners and owner.casefold() not in {each.casefold() for each in owners}:
        raise StorageError(
            f"the repository does not exist, and the token may not create one for {owner}",
            hint=f"it may for {show(', '.join(owners), 200)}",
        )


def _role(value: strict_json.Json) -> object:
    for key in ("auth", "accessToken", "role"):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _owners(value: strict_json.Json) -> list[str]:
    """The names under which the owner of the token may make repositories."""
    fields = value if isinstance(value, dict) else {}
    orgs = fields.get("orgs")
    named = [fields, *(orgs if isinstance(orgs, list) else ())]
    makers = [each for each in named if isinstance(each, dict) and each.get("roleInOrg") != "read"]
    return [name for each in makers if isinstance(name := each.get("name"), str)]


def refuse_moved(place: Place, inputs: Sequence[str]) -> None:
    """Raises: StorageError: the output would replace, on its branch, an input that is named by a commit or tag.

    Which branches have the commit is not asked: only an input of the main branch is known to be another branch's.
    """
    for given in inputs if place.has_branch else ():
        if not given.lower().startswith(SCHEME):
            continue
        source = Address.parse(given)
        one, other = (f"{each.folder}/".lstrip("/") for each in (source, place.address))
        is_same = source.repository.casefold() == place.address.repository.casefold()
        if is_same and source.branch != BRANCH and (one.startswith(other) or other.startswith(one)):
            text = f"the output may replace the input {show(given)}: both are in the same repository"
            hint = f"use a new branch: hf://{place.address.repository}@branch"
            raise StorageError(text, where=str(place.address), hint=hint)


def earlier_output(
    place: Place, names: Collection[str], written: Callable[[str], Collection[str]] | None, *, overwrite: bool
) -> frozenset[str]:
    """The files of an earlier output of this package in the folder of an output.

    Args:
        names: of the files that the run will write, as far as known.
        written: gives the names of files that an earlier run wrote into the folder at an address.

    Raises: StorageError: something is there, and may not be replaced.
    """
    there = place.files().keys() - OF_THE_HUB
    if not there:
        return frozenset()
    if not overwrite:
        hint = f"replace its files with --overwrite; {_OTHER_BRANCH}"
        raise StorageError(
            "the output exists already: the repository is not empty", where=str(place.address), hint=hint
        )
    assert place.state is not None
    ours = frozenset(written(str(place.address.at(place.state.commit))) if written is not None else ()) & there
    ours -= {_CARD}
    if names:
        check_stale(place, names, ours)
    return ours


def check_stale(place: Place, names: Collection[str], ours: Collection[str]) -> None:
    """Raises: StorageError: weights of others would stay beside the new ones, and programs might load those."""
    stay = place.files().keys() - set(names) - set(ours)
    folders = {name.rpartition("/")[0] for name in names}
    stale = sorted(name for name in stay if name.lower().endswith(_WEIGHTS) and name.rpartition("/")[0] in folders)
    if stale:
        more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        raise StorageError(
            f"{show(stale[0], 100)}{more} would stay next to the new weights, and programs may load the old ones",
            where=str(place.address),
            hint=f"remove it from the repository first, or write elsewhere: {_OTHER_BRANCH}",
        )
