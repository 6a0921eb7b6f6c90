"""Translates names of original models to those of diffusers and back: splits and fuses modules, swaps halves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from loraformat.diagnostics import in_weights
from loraformat.errors import FormatError, UnsupportedUpdate
from loraformat.formats.kit.image.modules import WEIGHT, Chains
from loraformat.formats.kit.image.rows import Span, exchange_halves, inputs_of, rows_of, select, stack
from loraformat.model.updates import Update
from loraformat.naming.families import DIFFUSERS, Family, Module, Place, spelled

# Shape of the weight or bias of a module by its name, where a base knows it.
ShapeOf = Callable[[str, str], "tuple[int, ...] | None"]
Modules = Mapping[str, Chains]


def no_shapes(module: str, parameter: str) -> None:
    """Shapes where there is no base."""
    del module, parameter


def to_diffusers(place: Place, chains: Chains, shape_of: ShapeOf, where: str) -> dict[str, Chains]:
    """The updates of a module of the original, by the modules of diffusers.

    Args:
        shape_of: of the modules of diffusers.
        where: what the file calls the module, for messages.

    Raises: FormatError (LF012): the rows cannot be those of the parts. UnsupportedUpdate (LF013): see `rows.select`.
    """
    names = place.diffusers
    inputs = _inputs(chains, names, shape_of)
    if len(names) == 1:
        return {names[0]: _exchanged(place.module, chains, inputs, where)}
    found: dict[str, Chains] = {name: {} for name in names}
    for parameter, chain in chains.items():
        shapes = [shape_of(name, parameter) for name in names]
        for update in chain:
            spans = _spans(place.module, rows_of(update), inputs, shapes, where)
            for name, span in zip(names, spans, strict=True):
                found[name][parameter] = (*found[name].get(parameter, ()), select(update, [span]))
    return found


def _inputs(chains: Chains, names: Sequence[str], shape_of: ShapeOf) -> int | None:
    """Inputs of the layer: by its weight's update, or by the base."""
    known = next((size for update in chains.get(WEIGHT, ()) if (size := inputs_of(update)) is not None), None)
    shapes = [shape_of(name, WEIGHT) for name in names]
    return known or next((shape[1] for shape in shapes if shape is not None and len(shape) > 1), None)


def _exchanged(module: Module, chains: Chains, inputs: int | None, where: str) -> Chains:
    """The updates with their halves exchanged, where the module is one whose halves are.

    The last block of SD3 alone has (shift, scale) in its context: twice the inputs, six times in the others.
    """
    if not module.is_swapped:
        return chains
    rows = {rows_of(update) for chain in chains.values() for update in chain}
    if inputs is None and "{}" in module.original:
        raise FormatError(
            "only the base weight tells whether this is the module of the last block, whose halves are swapped",
            where=in_weights(where),
            hint="pass the base with --base",
        )
    if inputs is not None and rows != {2 * inputs}:
        return chains
    return {name: tuple(exchange_halves(update) for update in chain) for name, chain in chains.items()}


def _spans(
    module: Module, rows: int, inputs: int | None, shapes: Sequence[tuple[int, ...] | None], where: str
) -> list[Span]:
    """Where the rows of each part stand: as the base has them, or as the family has them in every model."""
    sizes = _sizes(module, rows, inputs, shapes)
    if sizes is None or sum(sizes) != rows or min(sizes) < 1:
        parts = ", ".join(name.rpartition(".")[2] for name in module.diffusers)
        known = "" if None in shapes else f": the base has {', '.join(str(shape[0]) for shape in shapes if shape)}"
        raise FormatError(f"{rows} rows cannot be those of {parts}{known}", where=in_weights(where))
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _sizes(module: Module, rows: int, inputs: int | None, shapes: Sequence[tuple[int, ...] | None]) -> list[int] | None:
    if all(shapes):
        return [shape[0] for shape in shapes if shape]
    units = module.rows
    if inputs is not None and units:
        exact = [unit * inputs for unit in units]
        if sum(exact) == rows and all(size.denominator == 1 for size in exact):
            return [int(size) for size in exact]
    count = len(module.diffusers)
    if len(set(units)) < 2:
        return [rows // count] * count if rows % count == 0 else None
    if inputs is not None and set(units[:-1]) == {Fraction(1)}:  # query, key and value, and the rest is the MLP's
        return [*[inputs] * (count - 1), rows - inputs * (count - 1)]
    return None


def to_original(family: Family, modules: Modules, shape_of: ShapeOf = no_shapes) -> dict[str, Chains]:
    """The updates of modules of diffusers, by the modules of the original.

    Args:
        shape_of: of the modules of diffusers.

    Raises: UnsupportedUpdate (LF013): rows of a part that is not there are unknown, or see `rows.stack`.
        FormatError (LF012): the family has no such module.
    """
    groups: dict[str, tuple[Place, dict[int, Chains]]] = {}
    for name, chains in modules.items():
        place = family.find(spelled(name), DIFFUSERS)
        if place is None:
            raise FormatError(f"{family.title} has no module of this name", where=in_weights(name))
        groups.setdefault(place.original, (place, {}))[1][place.part or 0] = chains
    found: dict[str, Chains] = {}
    for original, (place, parts) in groups.items():
        whole = Place(place.module, None, place.numbers)
        if len(place.module.diffusers) == 1:
            inputs = _inputs(parts[0], whole.diffusers, shape_of)
            found[original] = _exchanged(place.module, parts[0], inputs, original)
        else:
            found[original] = _fused(whole, parts, shape_of)
    return found


def _fused(place: Place, parts: Mapping[int, Chains], shape_of: ShapeOf) -> Chains:
    names = place.diffusers
    fused: Chains = {}
    for parameter in dict.fromkeys(name for chains in parts.values() for name in chains):
        chains = {number: chains[parameter] for number, chains in parts.items() if parameter in chains}
        if any(len(chain) != 1 for chain in chains.values()):
            raise UnsupportedUpdate("several updates of a part of a fused module", where=in_weights(place.original))
        updates: list[Update | None] = [chains[n][0] if n in chains else None for n in range(len(names))]
        inputs = next((size for chain in chains.values() if (size := inputs_of(chain[0])) is not None), None)
        sizes = [
            rows_of(update) if update is not None else _absent_rows(place, number, updates, inputs, shape_of, parameter)
            for number, update in enumerate(updates)
        ]
        fused[parameter] = (stack(list(zip(updates, sizes, strict=True))),)
    return fused


def _absent_rows(
    place: Place,
    number: int,
    updates: Sequence[Update | None],
    inputs: int | None,
    shape_of: ShapeOf,
    parameter: str,
) -> int:
    """How many rows a part has that the adapter does not change."""
    shape = shape_of(place.diffusers[number], parameter)
    if shape is not None:
        return shape[0]
    units = place.module.rows
    if units and inputs is not None:
        size = units[number] * inputs
        # The family's proportions hold in this model where they hold for the parts that are there.
        fits = all(
            rows_of(update) == unit * inputs for update, unit in zip(updates, units, strict=True) if update is not None
        )
        if fits and size.denominator == 1:
            return int(size)
    if len(set(units)) == 1:
        return next(rows_of(update) for update in updates if update is not None)
    raise UnsupportedUpdate(
        f"only the base tells how many rows {place.diffusers[number]} has",
        where=in_weights(place.original),
        hint="pass it with --base",
    )
