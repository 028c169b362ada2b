"""`distspec ingest --check`: is a store what was written into it?"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from distspec.errors import LayoutError
from distspec.stages.ingest.finish import duplicate_rows
from distspec.store import Layer, SpectraStore

__all__ = ["Verifier", "audit"]

Mapper = Callable[[Any, tuple[Any, ...], Sequence[Any]], Iterable[tuple[str, int, str]]]


class Verifier:
    """Verifies one shard of one layer after the other; lives in a worker."""

    def __init__(self, path: str) -> None:
        self._layers = {layer.name: layer for layer in SpectraStore.open(path).all_layers()}

    def __call__(self, item: tuple[str, int]) -> tuple[str, int, str]:
        """Give the layer, the shard, and what is wrong with it (empty where nothing is)."""
        name, shard = item
        return name, shard, self._layers[name].verify(shard)


def audit(store: SpectraStore, mapper: Mapper, *, mend: bool = False) -> list[str]:
    """Read every chunk of a store and say what is wrong: shapes, checksums, missing files, marks, ids that come twice.

    Arguments:
        store: opened for writing where it is to be mended.
        mapper: applies a worker class, its arguments and items, in any order.
        mend: take the marks of damaged shards away, so that their stages write them again.

    Returns:
        One line for each problem; none where the store is whole.
    """
    problems = list(store.damage)
    if mend:
        store.forget_sample_layer()
    try:
        rows = store.inventory().rows
        # A store that was written by hand, through `SpectraStore.create`, has none.
        if rows not in (0, store.rows):
            problems.append(f"{store.path}: the inventory has {rows} rows; the store has {store.rows}")
    except LayoutError as error:
        problems.append(str(error))
    layers = {layer.name: layer for layer in store.all_layers()}
    items = [(name, shard) for name, layer in layers.items() for shard in layer.written()]
    for name, shard, problem in mapper(Verifier, (store.address,), items):
        if not problem:
            continue
        problems.append(problem + ("; taken from the store, to be written again" if mend else ""))
        if mend:
            layers[name].reopen(shard)
    for layer in layers.values():
        problems += _unwritten(layer)
    if not problems and not store.finished:
        problems.append(f"{store.path} is not settled; run `distspec ingest` to finish it")
    if not problems:
        problems += _not_unique(store)
    return problems


def _unwritten(layer: Layer) -> list[str]:
    pending = layer.pending()
    return [f"{layer.name}: {len(pending)} of {layer.shards} shards are not written; run its stage"] if pending else []


def _not_unique(store: SpectraStore) -> list[str]:
    """Name ids that several usable spectra have."""
    again = duplicate_rows(store)
    again = again[store.status()[again] == 0] if again.size else again
    if not again.size:
        return []
    first = store.column("id", again[:1])[0]
    return [f"{store.path}: {again.size} usable spectra have an id that an earlier one has; the first: {first}"]
