from pathlib import Path

import numpy as np
import pytest
import torch

from distspec.config import Train
from distspec.models.training.feed import Feed
from distspec.spectra import Spectra
from distspec.stages.ingest.stage import ingest
from distspec.statistics import holdout
from distspec.store import SpectraStore
from tests.conftest import make_store
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

    def spoiled(spans: object, chosen: object) -> tuple[np.ndarray, ...]:
        rows, flux, ivar, redshift = load(spans, chosen)
        flux[0, 7] = 1e30
        return rows, flux, ivar, redshift

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


def test_even_two_spectra_can_be_trained_and_validated_on(store: SpectraStore) -> None:
    draw = np.array([0.5, 0.9, 0.7])
    held = holdout._drawn(draw, np.array([True, False, True]), 0.01)
    assert held.tolist() == [True, False, False]


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
