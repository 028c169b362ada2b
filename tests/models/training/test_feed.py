import threading
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distspec.config import Train
from distspec.errors import StoreError
from distspec.models.autoencoders.dense import Progress
from distspec.models.training import spectra as supply
from distspec.models.training.feed import Feed
from distspec.models.training.group import Shares
from distspec.models.training.loop import fit
from distspec.models.training.steps import ByShares
from distspec.spectra import Spectra, WaveGrid
from distspec.stages.ingest.stage import ingest
from distspec.store import SpectraStore
from tests.conftest import make_spectra, make_store
from tests.support.small import SMALL, small


def test_every_training_spectrum_is_seen_once_and_no_validation_spectrum(store: SpectraStore) -> None:
    settings = Train(batch=5, validation=0.3)
    feed = Feed(store.path, settings, seed=1)
    flux = np.concatenate([batch[0].numpy() for batch in feed.batches(0)])
    flux_of, ivar_of = store.base.read("flux"), store.base.read("ivar")
    known = {row.tobytes(): index for index, row in enumerate(np.where(ivar_of > 0, flux_of, np.float32(0)))}
    seen = [known[row.astype(np.float32).tobytes()] for row in flux]
    assert len(seen) == len(set(seen)) == feed.steps * 5
    assert set(seen) <= set(np.flatnonzero(feed.training))
    assert not (feed.training & feed.validation).any()
    assert not (feed.training | feed.validation)[[3, 20]].any()  # set aside


def test_workers_share_the_spectra_and_give_equally_many_batches(store: SpectraStore) -> None:
    settings = Train(batch=8, validation=0.3)
    feeds = [Feed(store.path, settings, 1, rank, 2) for rank in range(2)]
    counts = [len(list(feed.batches(3))) for feed in feeds]
    assert counts[0] == counts[1] == feeds[0].steps
    np.testing.assert_array_equal(feeds[0].validation, feeds[1].validation)
    rows = sum(len(flux) for feed in feeds for flux, *_ in feed.validation_batches())
    assert rows == feeds[0].validation.sum()


def test_the_order_changes_with_the_epoch_and_not_with_the_run(store: SpectraStore) -> None:
    first, again = (Feed(store.path, Train(batch=8), 1) for _ in range(2))
    for epoch in (0, 1):
        for one, two in zip(first.batches(epoch), again.batches(epoch), strict=True):
            assert torch.equal(one[0], two[0])
    assert not torch.equal(next(first.batches(0))[0], next(first.batches(1))[0])


def test_the_cache_changes_nothing(store: SpectraStore) -> None:
    held, streamed = (Feed(store.path, Train(batch=8, cache_gb=size), 1) for size in (1.0, 0.0))
    assert type(held._spectra) is not type(streamed._spectra)
    for epoch in (0, 1):
        for one, two in zip(held.batches(epoch), streamed.batches(epoch), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for one, two in zip(held.validation_batches(), streamed.validation_batches(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def mixed(store: SpectraStore, feed: Feed, rank: int, world: int, epoch: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Give the batches of a worker as they are defined: everything at hand, one chunk after the other."""
    whole = store.between(0, store.rows)
    flux = np.where(whole.ivar > 0, whole.flux, np.float32(0))
    height = store.chunk_rows
    usable = feed.training | feed.validation
    chunks = [start for start in range(0, store.rows, height) if usable[start : start + height].any()][rank::world]
    chunks = [start for start in chunks if feed.training[start : start + height].any()]
    rng = np.random.default_rng([1, epoch, rank])
    order = [chunks[index] for index in rng.permutation(len(chunks))]
    rows, left = np.zeros(0, np.int64), feed.steps
    for pool in cycle([order[start : start + 16] for start in range(0, len(order), 16)]):
        parts = [np.flatnonzero(feed.training[start : start + height]) + start for start in pool]
        rows = np.concatenate([rows, *parts])
        rows = rows[rng.permutation(len(rows))]
        while len(rows) >= feed.batch:
            batch, rows = rows[: feed.batch], rows[feed.batch :]
            yield flux[batch], whole.ivar[batch], np.zeros(len(batch), np.float32)
            left -= 1
            if not left:
                return


@pytest.fixture
def chunked(tmp_path: Path, rng: np.random.Generator, spectra: Spectra) -> SpectraStore:
    """Eighty spectra in forty chunks: three pools for one worker, two for each of two."""
    twice = np.tile(np.arange(40), 2)
    many = Spectra(np.arange(80), spectra.flux[twice] * rng.uniform(0.5, 2, (80, 1)), spectra.ivar[twice], spectra.grid)
    many = Spectra(many.rows, many.flux.astype(np.float32), many.ivar, many.grid)
    status = np.zeros(80, np.int32)
    status[[3, 20, 21, 55]] = 2
    return make_store(tmp_path / "chunked.zarr", many, shard_rows=16, chunk_rows=2, status=status)


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize(("rank", "world", "batch"), [(0, 1, 5), (1, 2, 14), (0, 1, 50), (2, 30, 30)])
def test_batches_are_the_same_for_any_number_of_readers(
    chunked: SpectraStore, readers: int, rank: int, world: int, batch: int
) -> None:
    feed = Feed(chunked.path, Train(batch=batch, validation=0.3, cache_gb=0, readers=readers), 1, rank, world)
    for epoch in (0, 1):
        pairs = zip(feed.batches(epoch), mixed(chunked, feed, rank, world, epoch), strict=True)
        for found, expected in pairs:
            for one, two in zip(found, expected, strict=True):
                assert one.dtype == torch.float32
                assert one.numpy().tobytes() == two.tobytes()
    assert not reading()


@pytest.mark.parametrize("readers", [1, 3])
def test_batches_are_the_same_where_shards_are_read_chunk_by_chunk(
    tmp_path: Path, rng: np.random.Generator, readers: int
) -> None:
    many = make_spectra(rng, WaveGrid.between("log", 3600.0, 7200.0, 1_200), 2_050)
    store = make_store(tmp_path / "s.zarr", many, shard_rows=1_024, chunk_rows=64)
    feed = Feed(store.path, Train(batch=100, validation=0.3, cache_gb=0, readers=readers), 1)
    for found, expected in zip(feed.batches(0), mixed(store, feed, 0, 1, 0), strict=True):
        assert all(one.numpy().tobytes() == two.tobytes() for one, two in zip(found, expected, strict=True))
    assert feed.store.base._direct["flux"] is not None
    for rows, (flux, ivar, _) in feed.in_order(feed.validation):
        np.testing.assert_array_equal(ivar, many.ivar[rows])
        np.testing.assert_array_equal(flux, np.where(many.ivar[rows] > 0, many.flux[rows], 0))


def reading() -> list[str]:
    return [
        thread.name for thread in threading.enumerate() if thread.name.startswith(("distspec-ahead", "distspec-reader"))
    ]


@pytest.mark.parametrize("readers", [1, 3])
def test_threads_end_with_an_epoch_that_is_left_early(chunked: SpectraStore, readers: int) -> None:
    feed = Feed(chunked.path, Train(batch=5, validation=0.3, cache_gb=0, readers=readers), 1)
    for given in (feed.batches(0), feed.validation_batches(), feed.in_order(feed.training)):
        next(given)
        assert reading()
        given.close()
        assert not reading()


class Failing(nn.Module):
    """An objective that fails at its third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.zeros(1)), 0

    def forward(self, flux: Tensor, ivar: Tensor, redshift: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.calls == 3:
            raise ArithmeticError("the third")
        return (flux * self.weight).sum(), torch.tensor(len(flux))


@pytest.mark.parametrize("shares", [0, 2])
def test_threads_end_with_a_fit_that_fails(chunked: SpectraStore, tmp_path: Path, shares: int) -> None:
    settings, model = Train(batch=6, validation=0.3, cache_gb=0), Failing()
    feeds = tuple(Feed(chunked.path, settings, 1, share, shares or 1) for share in range(shares or 1))
    with pytest.raises(ArithmeticError):
        fit(model, model, ByShares(feeds, Shares(2)) if shares else feeds[0], settings, tmp_path / "state", 1)
    assert not reading()


@pytest.mark.parametrize("readers", [1, 3])
def test_what_a_reader_fails_at_reaches_the_training(chunked: SpectraStore, readers: int) -> None:
    feed = Feed(chunked.path, Train(batch=5, validation=0.3, cache_gb=0, readers=readers), 1)
    for damaged in sorted((Path(chunked.path) / "base" / "flux" / "c").rglob("0"))[-2:]:
        damaged.write_bytes(damaged.read_bytes()[:-7])
    for given in (feed.batches(0), feed.in_order(feed.training)):
        with pytest.raises(StoreError, match="is damaged in rows"):
            list(given)
        assert not reading()


@pytest.mark.parametrize("readers", [1, 4])
def test_no_more_than_two_pools_are_read_ahead_of_the_training(
    chunked: SpectraStore, monkeypatch: pytest.MonkeyPatch, readers: int
) -> None:
    feed = Feed(chunked.path, Train(batch=1, validation=0.3, cache_gb=0, readers=readers), 1)
    read: list[int] = []
    between = feed.store.between
    monkeypatch.setattr(
        feed.store, "between", lambda start, stop, **more: read.append(start) or between(start, stop, **more)
    )
    batches = feed.batches(0)
    for _ in range(5):
        next(batches)
    batches.close()
    assert supply.POOL <= len(read) <= 2 * supply.POOL
    # And no chunk is read that no step needs.
    read.clear()
    list(feed.batches(0))
    assert len(read) == len(set(read)) == len(feed._trainable)


def test_a_worker_holds_its_share_where_that_fits(chunked: SpectraStore) -> None:
    whole = 8e-9 * 76 * chunked.grid.pixels

    def held(share: float, rank: int = 0, world: int = 1, feeds: int = 1) -> bool:
        settings = Train(batch=4, cache_gb=share * whole)
        return isinstance(Feed(chunked.path, settings, 1, rank, world, feeds=feeds)._spectra, supply.Held)

    assert held(1.0) and not held(0.99)
    assert held(0.55, 1, 2) and not held(0.45, 1, 2)
    # Two of four shares are one worker's: they have its memory together.
    assert held(0.55, 1, 4, feeds=2) and not held(0.45, 1, 4, feeds=2)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [0.0, 1.0])
def test_batches_on_a_gpu_are_those_of_the_processor(chunked: SpectraStore, device: str, cache: float) -> None:
    settings = Train(batch=5, validation=0.3, cache_gb=cache)
    there, here = Feed(chunked.path, settings, 1, device=device), Feed(chunked.path, settings, 1)
    for given, expected in (
        (there.batches(0), here.batches(0)),
        (there.validation_batches(), here.validation_batches()),
    ):
        for one, two in zip(given, expected, strict=True):
            # Time in which memory that is given away too early would be written over.
            torch.ones(500, 500, device=device).matrix_power(9)
            assert all(a.device.type == "cuda" and torch.equal(a.cpu(), b) for a, b in zip(one, two, strict=True))


def test_another_batch_size_shares_what_is_held(store: SpectraStore) -> None:
    feed = Feed(store.path, Train(batch=8), 1)
    other = feed.with_batch(4)
    assert (feed.batch, other.batch) == (8, 4)
    assert feed.steps <= other.steps // 2 <= feed.steps + 1
    next(feed.batches(0))
    assert other._spectra is feed._spectra


def test_a_pixel_of_1e30_does_not_become_the_mean_spectrum(
    store: SpectraStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Feed(store.path, Train(batch=8), 1)
    before = feed.mean()
    load = feed._streamed.load

    def spoiled(span: tuple[int, int], chosen: np.ndarray) -> tuple[np.ndarray, tuple[torch.Tensor, ...]]:
        rows, tensors = load(span, chosen)
        tensors[0][0, 7] = 1e30
        return rows, tensors

    monkeypatch.setattr(feed._streamed, "load", spoiled)
    assert torch.allclose(before, feed.mean(), atol=0.05)


@pytest.mark.parametrize(("frame", "cache"), [("rest", 0.0), pytest.param("observed", 1.0, marks=pytest.mark.slow)])
def test_a_model_is_trained_on_what_it_scores(tmp_path: Path, frame: str, cache: float, ray_session: None) -> None:
    sample = {"missing_max": 0.1, "impute": True, "divide_by_mean": True}
    prepare = SMALL["ingest"]["prepare"] | {"frame": frame, "sample": sample}
    store = ingest(small(tmp_path / "out", ingest=SMALL["ingest"] | {"prepare": prepare}))
    feed = Feed(store.path, Train(batch=8, cache_gb=cache), 1)
    for chosen in (feed.training, feed.validation):
        for rows, (flux, ivar, redshift) in feed.in_order(chosen):
            seen = store.take(rows)
            np.testing.assert_array_equal(ivar.numpy(), seen.ivar)
            np.testing.assert_array_equal(flux.numpy(), np.where(seen.ivar > 0, seen.flux, 0))
            expected = np.zeros(len(rows)) if seen.redshift is None else seen.redshift
            np.testing.assert_array_equal(redshift.numpy(), expected.astype(np.float32))
            # And that is not what stands in the store.
            assert not np.array_equal(seen.flux, store.take(rows, frozen=False).flux)


@pytest.mark.parametrize("cache", [0.0, 1.0])
def test_a_worker_whose_chunks_are_all_set_aside_still_gets_batches(
    tmp_path: Path, spectra: Spectra, cache: float
) -> None:
    status = np.where(np.arange(40) < 8, 0, 2).astype(np.int32)
    store = make_store(tmp_path / "store.zarr", spectra, shard_rows=16, chunk_rows=8, status=status)
    for rank in range(2):
        feed = Feed(store.path, Train(batch=4, validation=0.3, cache_gb=cache), 1, rank, 2)
        assert [len(batch[0]) for batch in feed.batches(0)] == [2] * feed.steps
        # It adds nothing to what is counted once over all workers.
        assert sum(len(rows) for rows, _ in feed.in_order(feed.training)) == (feed.training.sum() if rank == 0 else 0)
