"""A simulated survey of ordinary galaxies, an autoencoder that knows them, and what is odd about others.

All is made in this process. The model has seen rows up to `TRAINING` and nothing odd; tests take their rows after it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from distspec.config import Cuts, Dense, Fit, Grid, Prepare, Score, Simulate, Sky, Sliced
from distspec.detectors.explainable import Explainable
from distspec.detectors.neural.scores import ModelScores
from distspec.models.autoencoders.dense import DenseAutoencoder
from distspec.models.checkpoint import Checkpoint
from distspec.models.training.group import Alone
from distspec.models.training.loop import Reconstruction, fit
from distspec.prepare.recipe import Recipe
from distspec.sources.simulation.survey import SimulatedSurvey
from distspec.spectra import LIGHT_SPEED, Spectra
from distspec.spectra.lines.wavelengths import EMISSION
from distspec.stages.evaluate.injection import inject
from distspec.stages.train.density import Latents, fit_density

__all__ = ["H_ALPHA", "O_III", "TRAINING", "Survey", "make_survey", "planted", "recipe", "scaled_arm", "two_peaks"]

TRAINING: Final = 2_560

H_ALPHA: Final = EMISSION["H alpha"]
O_III: Final = EMISSION["[O III] 5008"]

_SEED: Final = 7
_ROWS: Final = 8_192
_HELD: Final = 0.15

# As fine as SDSS, 70 km/s: 1.17 Å at [O III] 5008, 1.52 Å at Hα.
_GRID: Final = Grid(scale="log", first=4800.0, last=6800.0, pixels=1500)
_CUTS: Final = Cuts(z_min=0.01, z_max=0.35)


def recipe(sky: str = "mask") -> Prepare:
    """Give the recipe of the survey, with one treatment of the sky line at 5577 Å."""
    return Prepare(grid=_GRID, cuts=_CUTS, sky=Sky.model_validate({"mode": sky}))


class Survey(NamedTuple):
    """What all tests ask.

    Arguments:
        source: ordinary galaxies, seen by SDSS.
        checkpoint: an autoencoder of the first of them, with the density of their latents.
        ordinary: some that it was trained with.
    """

    source: SimulatedSurvey
    checkpoint: Checkpoint
    ordinary: Spectra

    def scores(self, *names: str) -> Explainable:
        """Give scores of the model."""
        return Explainable(names, ModelScores(self.checkpoint, Score()))

    def read(self, rows: Int64[np.ndarray, "m"], *skies: str) -> tuple[list[Spectra], Float64[np.ndarray, "n"]]:
        """Prepare some rows, once for each treatment of the sky; give those that all can use, and their redshifts."""
        return _read(self.source, rows, skies or ("mask",))


def _read(
    source: SimulatedSurvey, rows: Int64[np.ndarray, "m"], skies: tuple[str, ...]
) -> tuple[list[Spectra], Float64[np.ndarray, "n"]]:
    first = int(rows.min())
    seen, columns = source.rows(first, int(rows.max()) + 1)
    seen, columns = seen[rows - first], {name: values[rows - first] for name, values in columns.items()}
    made = [Recipe(recipe(sky), source.grid)(seen, columns) for sky in skies]
    usable = np.all([told["status"] == 0 for _, told in made], axis=0)
    return [spectra[usable] for spectra, _ in made], columns["z"][usable]


def make_survey(folder: Path) -> Survey:
    """Simulate galaxies without anomalies, and fit the model; states go to the folder."""
    settings = Simulate(spectra=_ROWS, galaxies=1.0, quasars=0.0, stars=0.0, anomalies=0.0)
    source = SimulatedSurvey(settings, _SEED)
    (spectra,), _ = _read(source, np.arange(TRAINING), ("mask",))
    return Survey(source, _trained(spectra, folder), spectra[:64])


# --- the model --------------------------------------------------------------------------------------------------------


class _Batches:
    """Spectra in memory, as `fit` takes them."""

    def __init__(self, spectra: Spectra, batch: int) -> None:
        flux = torch.from_numpy(np.where(spectra.good, spectra.flux, np.float32(0)))
        ivar = torch.from_numpy(spectra.ivar)
        held = int(_HELD * len(spectra))
        self.held, self.training = ([flux[part], ivar[part]] for part in (slice(0, held), slice(held, None)))
        self.steps, self._batch = len(self.training[0]) // batch, batch

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """Give the training batches, in a new order every epoch."""
        order = torch.from_numpy(np.random.default_rng([_SEED, epoch]).permutation(len(self.training[0])))
        for chosen in order[: self.steps * self._batch].view(self.steps, self._batch):
            yield (*(values[chosen] for values in self.training), torch.zeros(len(chosen)))

    def validation_batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Give the others, at once."""
        yield (*self.held, torch.zeros(len(self.held[0])))


def _trained(spectra: Spectra, folder: Path) -> Checkpoint:
    """Fit the autoencoder and the density of its latents."""
    torch.manual_seed(_SEED)
    settings = Dense(hidden=(200, 100), latents=8)
    flow = Sliced(layers=15, components=1)
    fitting = Fit(epochs=25, batch=64, patience=25, learning_rate=2e-3)
    feed = _Batches(spectra, fitting.batch)
    model = DenseAutoencoder(settings, spectra.grid)
    flux, ivar = feed.training
    model.settle(flux.sum(dim=0) / (ivar > 0).sum(dim=0))
    fit(model, Reconstruction(model, "chi2"), feed, fitting, folder / "model", _SEED)
    model.eval()
    found = []
    with torch.no_grad():
        for part in (feed.training, feed.held):
            values = model.encode(*part)
            found.append(Latents(torch.arange(len(values)), values, torch.zeros(len(values), dtype=torch.int64)))
    density, _, _ = fit_density(
        flow, found[0], found[1], ("all",), state=folder, seed=_SEED, group=Alone(), on_epoch=lambda epoch: None
    )
    return Checkpoint(model, settings, spectra.grid, "recipe", density=density, density_settings=flow)


# --- what is odd ------------------------------------------------------------------------------------------------------


def two_peaks(hosts: Spectra, apart: float, height: float = 2.0) -> Spectra:
    """Add Hα with two peaks, `apart` km/s to either side of its centre; at 0, with one."""
    velocity = LIGHT_SPEED * (hosts.grid.wave / H_ALPHA - 1.0)
    line = sum(np.exp(-0.5 * ((velocity - centre) / 100.0) ** 2) for centre in {-apart, apart})
    return replace(hosts, flux=(hosts.flux + height * line).astype(np.float32))


def scaled_arm(
    hosts: Spectra,
    starts: Int64[np.ndarray, "n"],
    factors: Float64[np.ndarray, "n"],
    *,
    fading: bool,
) -> Spectra:
    """Multiply each spectrum blueward of a pixel by a factor, or by one that fades to 1 at the blue end."""
    pixel = np.arange(hosts.grid.pixels)
    power = pixel / starts[:, None] if fading else np.ones((len(starts), len(pixel)))
    factor = np.where(pixel < starts[:, None], factors[:, None] ** power, 1.0)
    flux, ivar = hosts.flux * factor, hosts.ivar / factor**2
    return replace(hosts, flux=flux.astype(np.float32), ivar=ivar.astype(np.float32))


def planted(
    kinds: Sequence[str], hosts: Spectra, z: Float64[np.ndarray, "n"], each: int
) -> tuple[Spectra, Int64[np.ndarray, "m"]]:
    """Plant every kind in as many hosts of its own, at strength 1; give the spectra and the number of their kind.

    Raises:
        ValueError: there are too few hosts in which a kind is possible.
    """
    share = len(hosts) // len(kinds)
    found: list[Spectra] = []
    for number, kind in enumerate(kinds):
        own = slice(number * share, (number + 1) * share)
        one = inject(kind, hosts[own], z[own], 1.0, _SEED, recipe())
        possible = np.flatnonzero(one.possible)[:each]
        if len(possible) < each:
            raise ValueError(f"{kind} is possible in {len(possible)} of {share} hosts; expected {each}")
        found.append(one.spectra[possible])
    rows, flux, ivar = (np.concatenate([getattr(one, name) for one in found]) for name in ("rows", "flux", "ivar"))
    return Spectra(rows, flux, ivar, hosts.grid), np.repeat(np.arange(len(kinds)), each)
