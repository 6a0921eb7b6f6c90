"""The folder of an adapter, where the one that was named only contains it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from loraformat.containers.bundles import open_bundle
from loraformat.diagnostics import listed, show
from loraformat.errors import FormatError, MissingFile
from loraformat.model.bundle import Bundle
from loraformat.model.format_files import CONFIGS, has_config, is_part_of, weights_beside
from loraformat.storage import LocalStore

# Subfolders that are looked into; a folder with more of them is not the run of a trainer.
_MOST_FOLDERS = 1000


def open_adapter_files(uri: str) -> Bundle:
    """The files of the adapter at `uri`: of that folder, or of the one folder directly below it that holds an adapter.

    PEFT saves an adapter that is not called "default" into a folder of its name, trainers save into `checkpoint-N`.

    Raises:
        FormatError (LF012): several folders below hold an adapter; all are named.
        MissingFile (LF101): the config lies in the folder and the weights below it, without a config.
        StorageError: there is no such folder or file.
    """
    bundle = open_bundle(uri)
    if bundle.is_single_file or not isinstance(bundle.opened, LocalStore) or _has_weights(bundle):
        return bundle
    if not has_config(bundle) and bundle.tensor_files():
        return bundle
    found = list(_adapters_below(bundle))
    if not found:
        return bundle
    names = listed([show(os.path.basename(one.uri), 60) for one in found], 8)
    config = next((name for name in CONFIGS if name in bundle.files), None)
    if config is not None and not any(has_config(one) for one in found):
        import shlex

        copy = f"cp {show(shlex.join([os.path.join(uri, config), found[0].uri]), 400)}"
        hint = f"copy it beside the weights: {copy}" if len(found) == 1 else "copy it beside those that you mean"
        raise MissingFile(f"{config} is here, and the weights are in {names}", where=uri, hint=hint)
    if len(found) > 1:
        raise FormatError(
            f"{len(found)} folders below hold an adapter: {names}", where=uri, hint="give the one that you mean"
        )
    return replace(found[0], named=uri)


def _adapters_below(bundle: Bundle) -> Iterator[Bundle]:
    for name in bundle.folders[:_MOST_FOLDERS]:
        path = os.path.join(bundle.uri, name)
        if os.path.islink(path):
            continue
        below = open_bundle(path)
        if _has_weights(below):
            yield below


def _has_weights(bundle: Bundle) -> bool:
    return any(
        is_part_of(name, weights) for config in CONFIGS for weights in weights_beside(config) for name in bundle.files
    )
