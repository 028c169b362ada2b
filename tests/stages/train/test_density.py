"""Latents of one worker: kept with their rows, given in batches, fitted with or without a share."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distspec.config import Fit, Sliced, Spline, Train
from distspec.models.autoencoders.dense import Progress
from distspec.models.checkpoint import Checkpoint
from distspec.models.flows.spline_flow import SplineFlow
from distspec.models.training.feed import Feed
from distspec.models.training.group import ALONE
from distspec.models.training.loop import newest_epochs
from distspec.stages.train.density import Latents, _NegativeLogLikelihood, collect, fit_density, labels_of
from distspec.store import SpectraStore

SPLINE = Spline(transforms=1, hidden=(8,), bins=4, fit=Fit(epochs=2, batch=64))


def some(count: int, seed: int) -> Latents:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 2, generator=random)
    return Latents(torch.arange(count), values, torch.zeros(count, dtype=torch.int64))


def test_latents_stay_with_their_rows(store: SpectraStore, checkpoint: Checkpoint) -> None:
    feed = Feed(store.path, Train(batch=8, validation=0.3), 1)
    labels, names = labels_of(Sliced(), feed)
    assert names == ("all",)
    assert set(labels[feed.training | feed.validation]) == {0}
    found = collect(checkpoint.model, feed, feed.training, labels)
    assert found.rows.tolist() == np.flatnonzero(feed.training).tolist()
    for row, latent in zip(found.rows.tolist(), found.values, strict=True):
        one = store.take(np.array([row]))
        flux, ivar = torch.from_numpy(np.where(one.ivar > 0, one.flux, 0)), torch.from_numpy(one.ivar)
        assert torch.allclose(checkpoint.model.encode(flux, ivar)[0], latent, atol=1e-5)


def test_labels_are_the_catalogues(store: SpectraStore) -> None:
    feed = Feed(store.path, Train(batch=8, validation=0.3), 1)
    labels, names = labels_of(Sliced(labels=("status",)), feed)
    assert names == ("0",)
    assert (labels[~(feed.training | feed.validation)] == -1).all()


def test_a_worker_without_a_share_has_part_in_every_step() -> None:
    flow = SplineFlow(SPLINE, 2)
    total, count = _NegativeLogLikelihood(flow)(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), Progress(0, 1))
    total.backward()
    assert int(count) == 0
    assert all(weight.grad is not None and not weight.grad.any() for weight in flow.parameters())


@pytest.mark.parametrize("settings", [SPLINE, Sliced(layers=13, patience=50, components=1)])
def test_a_fit_that_is_done_is_not_done_again(settings: Spline | Sliced, tmp_path: Path) -> None:
    def fitted() -> tuple[torch.Tensor, list[dict[str, float]]]:
        density, _, phases = fit_density(
            settings,
            some(300, 1),
            some(100, 2),
            ("all",),
            state=tmp_path,
            seed=3,
            group=ALONE,
            on_epoch=lambda epoch: seen.append(epoch),
        )
        return density.log_prob(some(50, 4).values).detach(), phases["density"]

    seen: list[dict[str, float]] = []
    first, history = fitted()
    assert len(seen) == len(history) == len(newest_epochs(tmp_path / "density"))
    seen.clear()
    again, same = fitted()
    assert not seen
    assert same == history
    assert torch.equal(first, again)
