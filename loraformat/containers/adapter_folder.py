"""Finds the folder of an adapter if the given folder only contains it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

from loraformat.containers.bundles import METADATA, bundle_of_store, open_bundle
from loraformat.diagnostics import listed, show
from loraformat.errors import FormatError, MissingFile
from loraformat.model.bundle import Bundle, OpenedFiles, TensorFile
from loraformat.model.format_files import CONFIGS, FORMAT_FILES, has_config, is_part_of
from loraformat.storage import LocalStore, has_folders, open_below

# Subfolders that are looked into; a folder with more of them is not the run of a trainer.
_MOST_FOLDERS = 1000
_MOST_REMOTE_FOLDERS = 20  # each takes requests


def open_adapter_files(uri: str) -> Bundle:
    """The files of the adapter at `uri`: of that folder, or of the one folder directly below it that holds an adapter.

    PEFT saves an adapter that is not called "default" into a folder of its name, trainers save into `checkpoint-N`.

    Raises:
        FormatError (LF012): several folders below hold an adapter; all are named.
        MissingFile (LF101): the config lies in the folder and the weights below it, without a config.
        StorageError: there is no such folder or file.
    """
    bundle = open_bundle(uri)
    if bundle.is_single_file or not has_folders(bundle.opened) or _has_weights(bundle):
        return bundle
    if not has_config(bundle) and bundle.tensor_files():
        return bundle
    if (components := with_components(bundle)) is not bundle:
        return components
    found = list(_adapters_below(bundle))
    if not found:
        return bundle
    names = listed([show(os.path.basename(one.uri), 60) for one in found], 8)
    config = next((name for name in CONFIGS if name in bundle.files), None)
    if config is not None and not any(has_config(one) for one in found):
        import shlex

        copy = f"cp {show(shlex.join([os.path.join(uri, config), found[0].uri]), 400)}"
        hint = (
            f"copy it next to the weights: {copy}" if len(found) == 1 else "copy it next to the weights that you mean"
        )
        raise MissingFile(f"{config} is here, and the weights are in {names}", where=uri, hint=hint)
    if len(found) > 1:
        raise FormatError(
            f"{len(found)} subfolders contain an adapter: {names}",
            where=uri,
            hint="pass the path of the one that you mean",
        )
    return replace(found[0], named=uri)


def _adapters_below(bundle: Bundle) -> Iterator[Bundle]:
    most = _MOST_FOLDERS if isinstance(bundle.opened, LocalStore) else _MOST_REMOTE_FOLDERS
    for name in bundle.folders[:most]:
        path = os.path.join(bundle.uri, name)
        if os.path.islink(path):
            continue
        below = open_bundle(path)
        if _has_weights(below):
            yield below


def _has_weights(bundle: Bundle) -> bool:
    if isinstance(bundle.files.get(METADATA), TensorFile):
        return True
    return any(is_part_of(name, weights) for row in FORMAT_FILES for weights in row.weights for name in bundle.files)


def sources_of(bundle: Bundle) -> list[tuple[object, tuple[str, ...]]]:
    """The folders that the files of an adapter were read from, each with their names there."""
    if isinstance(bundle.opened, ComponentFiles):
        return [(store, tuple(store.files())) for store in bundle.opened.opened.values()]
    return [(bundle.opened, tuple(bundle.files))]


def has_components(path: str) -> bool:
    """Whether a folder of this machine holds PEFT folders of a pipeline's components and nothing else."""
    bundle = open_bundle(path)
    return with_components(bundle) is not bundle


def with_components(bundle: Bundle) -> Bundle:
    """The PEFT folders of the components of a pipeline as one adapter; other folders as they are.

    Names of files begin with the component's folder: "transformer/adapter_config.json".
    """
    if not bundle.folders or not has_folders(bundle.opened):
        return bundle
    from loraformat.naming.families import COMPONENTS

    if not set(bundle.folders) <= set(COMPONENTS):
        return bundle
    stores = {name: open_below(bundle.opened, name) for name in bundle.folders}
    inner = {name: bundle_of_store(store, store.uri) for name, store in stores.items() if store is not None}
    if not all(has_config(one) for one in inner.values()):
        return bundle
    files = {
        f"{folder}/{name}": replace(file, name=f"{folder}/{name}")
        for folder, one in inner.items()
        for name, file in one.files.items()
    }
    opened = ComponentFiles(bundle.uri, {name: one.opened for name, one in inner.items() if one.opened is not None})
    return replace(bundle, files={**bundle.files, **files}, folders=(), opened=opened)


class ComponentFiles:
    """The opened files of the folders of components, as one; names begin with the folder's. See OpenedFiles."""

    is_single_file = False

    def __init__(self, uri: str, opened: Mapping[str, OpenedFiles]) -> None:
        self.uri, self.opened = uri, opened

    def _of(self, path: str) -> tuple[OpenedFiles, str]:
        component, _, name = path.partition("/")
        return self.opened[component], name

    def files(self) -> Mapping[str, int]:
        """See OpenedFiles."""
        return {f"{name}/{file}": size for name, one in self.opened.items() for file, size in one.files().items()}

    def folders(self) -> tuple[str, ...]:
        """None that is not looked into."""
        return ()

    def size(self, path: str) -> int:
        """See OpenedFiles."""
        opened, name = self._of(path)
        return opened.size(name)

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """See OpenedFiles."""
        opened, name = self._of(path)
        return opened.read(name, offset, nbytes)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """See OpenedFiles."""
        opened, name = self._of(path)
        opened.read_into(name, offset, buffer)

    def identity(self, path: str) -> tuple[str | int, ...]:
        """See OpenedFiles."""
        opened, name = self._of(path)
        return opened.identity(name)

    def check_inside(self, path: str) -> None:
        """See OpenedFiles."""
        opened, name = self._of(path)
        opened.check_inside(name)
