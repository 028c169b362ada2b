"""Principal components of the survey, and how odd what they leave of a spectrum is, wavelength region by region."""

from collections.abc import Iterator, Sequence
from typing import Any, Final, Self

import numpy as np
from jaxtyping import Float32, Float64, Shaped

from distspec.config import AnyDetector, Pca
from distspec.detectors import Arrays, Fields
from distspec.detectors.classical.principal_components import CoMoments, Components, Origin, blocks, single, take
from distspec.detectors.classical.regions import Rarity, Regions
from distspec.errors import LayoutError
from distspec.spectra import Spectra, WaveGrid

__all__ = ["PcaDetector"]

_JUDGED: Final = 0.2
"""Share of a region's pixels that must be good to judge it; a lone pixel decides nothing."""

_FEWEST: Final = 3
"""And so many pixels, or all if a region has fewer."""


class PcaDetector:
    """Region-wise chi-squared of what principal components leave.

    For each region r, chi2_r is the mean over its good pixels of ivar (f - f̂)², or of (f - f̂)² where the settings say
    so. The score is the largest surprise over regions: -log10 of the share of the survey whose chi2_r is as large (see
    `Rarity`). Not the largest chi2_r itself: regions differ in how large it usually is. Those with strong emission
    lines, or with a systematic residual of the sky, would decide every score, and a line where none should be, small
    against those, none. Nor chi2 of the whole spectrum, which hardly changes when a few pixels do.

    A region is judged if 20 % of its pixels are good, and three. Where none is, chi2 of the whole spectrum takes its
    place, so that every spectrum with a good pixel has a finite score; the score of one without is NaN.

    Two looks: sums for the components (`CoMoments`), then counts of every region's chi2 (`Rarity`). With `fit="local"`
    each region has components of its own, from its block of the same sums; at most half as many as it has pixels,
    since as many as pixels would leave nothing.

    References:
        Reis et al., section 2.2.

    Arguments:
        settings: of the detector.
        grid: of the spectra.
        rest: whether that is in the rest frame, as the menu of regions is.
        origin: what sums start from.
        models: after the first look, components of the whole spectrum, then with `fit="local"` those of each region.
        rarity: after the second look, how often each chi2 occurs in each region; last for the whole spectrum.

    Raises:
        ConfigError: a region holds no pixel of the grid, or there is none.
    """

    def __init__(
        self,
        settings: Pca,
        grid: WaveGrid,
        rest: bool,
        origin: Origin,
        models: tuple[Components, ...] = (),
        rarity: Rarity | None = None,
    ) -> None:
        self.settings: AnyDetector = settings
        self.grid = grid
        self.regions = Regions.of(settings, grid, rest)
        self.rarity = rarity
        self._settings = settings
        self._rest = rest
        self._origin = origin
        self._models = models

    def __repr__(self) -> str:
        state = "looks for components" if not self._models else "looks for chi2" if self.looking else "fitted"
        return f"PcaDetector({self._settings.name!r}, {len(self.regions)} regions, {state})"

    # --- fit ----------------------------------------------------------------------------------------------------------

    @classmethod
    def parts(cls, settings: Pca) -> int:
        """Give 1: the sample only tells where sums start from."""
        return 1

    @classmethod
    def grow(cls, settings: Pca, sample: Spectra, seed: int, part: int) -> Arrays:
        """Take the origin of sums from the sample; nothing here is random.

        Raises:
            ConfigError: a region holds no pixel of the sample's grid, or there is none.
        """
        return cls(settings, sample.grid, sample.redshift is None, Origin.of(sample)).to_arrays()

    @classmethod
    def assemble(cls, settings: Pca, grid: WaveGrid, parts: Sequence[Arrays]) -> Self:
        """Make the detector that asks for its first look."""
        return cls.from_arrays(settings, grid, parts[0])

    @property
    def looking(self) -> bool:
        """True until components and the distribution of chi2 are known."""
        return self.rarity is None

    def look(self, spectra: Spectra) -> CoMoments | Rarity:
        """Summarize spectra: sums of pixels and of pairs of pixels at first, then counts of each region's chi2.

        Raises:
            LayoutError: the spectra are on another grid.
            ValueError: there is nothing left to look for.
        """
        self._require(spectra)
        if not self.looking:
            raise ValueError(f"{self!r} needs no look; call `score`")
        if not self._models:
            return CoMoments.of(spectra, self._origin)
        rarity = Rarity.zero(len(self.regions) + 1)
        for rows in blocks(len(spectra), self.grid.pixels):
            rarity += Rarity.of(self._chi2(spectra[rows]))
        return rarity

    def summary(self, arrays: Arrays) -> CoMoments | Rarity:
        """Give the sums or the counts again."""
        return Rarity(arrays["counts"]) if "counts" in arrays else CoMoments.from_arrays(arrays)

    def learn(self, summary: CoMoments | Rarity) -> Self:
        """Take in what a whole look gave: find the components, or freeze the distribution of chi2.

        Raises:
            ValueError: the summary is that of another look.
        """
        if isinstance(summary, Rarity):
            if not (self._models and self.looking):
                raise ValueError(f"{self!r} got counts of chi2; expected those of its own look")
            return self._with(self._models, summary)
        if self._models:
            raise ValueError(f"{self!r} got sums of pixels; its components are known")
        mean, covariance = summary.mean(self._origin), summary.covariance
        wanted = self._settings.components
        models = [Components.of(mean, covariance, wanted)]
        if self._settings.fit == "local":
            for start, stop in zip(self.regions.starts, self.regions.stops, strict=True):
                block = covariance[start:stop, start:stop]
                models.append(Components.of(mean[start:stop], block, min(wanted, (stop - start) // 2)))
        return self._with(tuple(models), None)

    def _with(self, models: tuple[Components, ...], rarity: Rarity | None) -> Self:
        return type(self)(self._settings, self.grid, self._rest, self._origin, models, rarity)

    # --- use ----------------------------------------------------------------------------------------------------------

    @property
    def fields(self) -> Fields:
        """The score; number of the region that decided it, -1 where none could be judged; and its chi2."""
        return {self._settings.name: ("f4", ()), "region": ("i4", ()), "region_chi2": ("f4", ())}

    @property
    def facts(self) -> dict[str, Any]:
        """Regions [low, high] in Å, number of components, and the share of the variance that they explain.

        With `fit="local"` there is one number and one share for each region.
        """
        kept: Any = [len(model.values) for model in self._models]
        explained: Any = [model.explained for model in self._models]
        if self._settings.fit == "global" or not self._models:
            kept, explained = (values[0] if values else None for values in (kept, explained))
        else:
            kept, explained = kept[1:], explained[1:]
        return {"regions": self.regions.edges(self.grid), "components": kept, "explained": explained}

    def score(self, spectra: Spectra) -> Float32[np.ndarray, "n"]:
        """Score spectra: -log10 of the share of the survey that is as odd in the oddest region; higher = odder.

        Raises:
            LayoutError: the spectra are on another grid.
            ValueError: a look is still needed.
        """
        return self.details(spectra)[self._settings.name]

    def details(self, spectra: Spectra) -> Arrays:
        """Give all `fields`.

        Raises:
            LayoutError: the spectra are on another grid.
            ValueError: a look is still needed.
        """
        count = len(spectra)
        score, chi2 = np.full(count, np.nan), np.full(count, np.nan)
        region = np.full(count, -1, np.int32)
        for rows, surprise, values in self._judge(spectra):
            each = np.where(np.isnan(surprise), -np.inf, surprise)
            best = each[:, :-1].argmax(axis=1)
            known = ~np.isnan(values[:, :-1]).all(axis=1)
            place = np.where(known, best, len(self.regions))[:, None]
            score[rows] = np.take_along_axis(surprise, place, axis=1)[:, 0]
            chi2[rows] = np.take_along_axis(values, place, axis=1)[:, 0]
            region[rows] = np.where(known, best, -1)
        return {self._settings.name: single(score), "region": region, "region_chi2": single(chi2)}

    def region_scores(self, spectra: Spectra) -> Float32[np.ndarray, "n regions"]:
        """Give the surprise of every region; NaN where too few of its pixels are good.

        Raises:
            LayoutError: the spectra are on another grid.
            ValueError: a look is still needed.
        """
        scores = np.zeros((len(spectra), len(self.regions)), np.float32)
        for rows, surprise, _ in self._judge(spectra):
            scores[rows] = surprise[:, :-1]
        return scores

    def region_chi2(self, spectra: Spectra) -> Float64[np.ndarray, "n regions+1"]:
        """Give chi2 per good pixel of every region, NaN where too few are good, and last that of the whole spectrum.

        In units of σ², or of flux² where residuals are not weighted.

        Raises:
            LayoutError: the spectra are on another grid.
            ValueError: the first look is still needed.
        """
        self._require(spectra)
        if not self._models:
            raise ValueError(f"{self!r} has no components; look at the survey and learn first")
        parts = [self._chi2(spectra[rows]) for rows in blocks(len(spectra), self.grid.pixels)]
        return np.concatenate([np.zeros((0, len(self.regions) + 1)), *parts])

    def _judge(
        self, spectra: Spectra
    ) -> Iterator[tuple[slice, Float64[np.ndarray, "n regions+1"], Float64[np.ndarray, "n regions+1"]]]:
        """Give rows, surprises and chi2 of some spectra after others."""
        self._require(spectra)
        if self.rarity is None:
            raise ValueError(f"{self!r} cannot score yet; look at the survey and learn until it no longer asks")
        for rows in blocks(len(spectra), self.grid.pixels):
            values = self._chi2(spectra[rows])
            yield rows, self.rarity.surprise(values), values

    def _chi2(self, spectra: Spectra) -> Float64[np.ndarray, "n regions+1"]:
        good = spectra.ivar > 0
        whole = self._models[0].project(spectra.flux, good)[1]
        terms = self._weighted(whole, spectra.ivar)
        seen = self.regions.sums(good)
        if self._settings.fit == "global":
            sums = self.regions.sums(terms)
        else:
            sums = np.empty((len(spectra), len(self.regions)))
            runs = zip(self.regions.starts, self.regions.stops, self._models[1:], strict=True)
            for region, (start, stop, model) in enumerate(runs):
                rest = model.project(spectra.flux[:, start:stop], good[:, start:stop])[1]
                sums[:, region] = self._weighted(rest, spectra.ivar[:, start:stop]).sum(axis=1)
        widths = self.regions.widths
        needed = np.maximum(np.ceil(_JUDGED * widths), np.minimum(_FEWEST, widths))
        chi2 = np.where(seen >= needed, sums / np.maximum(seen, 1), np.nan)
        count = good.sum(axis=1)
        total = np.where(count > 0, terms.sum(axis=1) / np.maximum(count, 1), np.nan)
        return np.concatenate([chi2, total[:, None]], axis=1)

    def _weighted(
        self, rest: Float64[np.ndarray, "n pixels"], ivar: Float32[np.ndarray, "n pixels"]
    ) -> Float64[np.ndarray, "n pixels"]:
        # In double precision not even the largest float32 overflows when squared. What is left is 0 where masked.
        square = rest**2
        return square * np.where(ivar > 0, ivar, 0.0) if self._settings.weight == "ivar" else square

    def _require(self, spectra: Spectra) -> None:
        if spectra.grid != self.grid:
            raise LayoutError(f"spectra on {spectra.grid}; the detector is for {self.grid}; fit it on these spectra")

    # --- as arrays ----------------------------------------------------------------------------------------------------

    def to_arrays(self) -> Arrays:
        """Give the detector as arrays, in any state of its fit.

        `rest`, `runs` (first pixel of each region, one past its last), `shift`, `reach`; after the first look those of
        `Components`, with `fit="local"` of each region with its number before a dot; after the second `counts`.
        """
        arrays: Arrays = {
            "rest": np.array([self._rest]),
            "runs": np.stack([self.regions.starts, self.regions.stops], axis=1),
            **self._origin.to_arrays(),
        }
        for number, model in enumerate(self._models):
            prefix = f"{number - 1}." if number else ""
            arrays |= {prefix + name: values for name, values in model.to_arrays().items()}
        if self.rarity is not None:
            arrays["counts"] = self.rarity.counts
        return arrays

    @classmethod
    def from_arrays(cls, settings: Pca, grid: WaveGrid, arrays: Arrays) -> Self:
        """Make the detector of `to_arrays` again.

        Raises:
            ValueError: an array is absent, too many, of another kind or shape, not finite, or not what it claims.
        """
        rest = bool(take(arrays, "rest", np.bool_, (1,))[0])
        detector = cls(settings, grid, rest, Origin.from_arrays(arrays, grid.pixels))
        regions = detector.regions
        runs = take(arrays, "runs", np.int64, (len(regions), 2))
        if not np.array_equal(runs, np.stack([regions.starts, regions.stops], axis=1)):
            raise ValueError("the regions are not those of the settings")
        if "mean" in arrays:
            models = [Components.from_arrays(arrays, grid.pixels)]
            for number, width in enumerate(regions.widths if settings.fit == "local" else []):
                prefix = f"{number}."
                own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
                models.append(Components.from_arrays(own, int(width)))
            detector = detector._with(tuple(models), None)
            if "counts" in arrays:
                detector = detector._with(tuple(models), Rarity(_counts(arrays, len(regions) + 1)))
        known = detector.to_arrays().keys()
        if arrays.keys() != known:
            raise ValueError(f"arrays {sorted(arrays)}; expected {sorted(known)}")
        return detector


def _counts(arrays: Arrays, rows: int) -> Shaped[np.ndarray, "regions bins"]:
    counts = take(arrays, "counts", np.int64, (rows, Rarity.BINS))
    # More than 2^53 spectra there are not, and sums of such counts do not wrap around.
    if counts.min() < 0 or counts.sum(axis=1, dtype=np.float64).max() > 2**53:
        raise ValueError("counts of chi2 are negative or too large")
    return counts
