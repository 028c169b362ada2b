"""Region-wise chi-squared: known answers, the region that decides, and a score that is a probability."""

from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from distspec.config import Pca
from distspec.detectors.classical.pca import PcaDetector
from distspec.detectors.classical.regions import MENU, Rarity, Regions
from distspec.errors import ConfigError, LayoutError
from distspec.spectra import Spectra, WaveGrid

pytestmark = pytest.mark.numeric

GRID = WaveGrid.between("log", 3600.0, 7200.0, 300)
FIT = [Pca(components=3), Pca(components=3, fit="local"), Pca(components=3, weight="none")]


def survey(rng: np.random.Generator, rows: int = 400, masked: float = 0.05, grid: WaveGrid = GRID) -> Spectra:
    """Two shapes, noise whose σ the survey knows but for 10 % from spectrum to spectrum; masked pixels hold garbage."""
    phase = np.linspace(0, 1, grid.pixels)
    shapes = np.stack([np.sin(4 * phase), np.exp(-0.5 * ((phase - 0.4) / 0.02) ** 2)])
    sigma = rng.uniform(0.02, 0.05, (rows, 1))
    noise = sigma * rng.normal(1, 0.1, (rows, 1)) * rng.normal(size=(rows, grid.pixels))
    flux = (1 + rng.normal(size=(rows, 2)) * [0.2, 0.3] @ shapes + noise).astype(np.float32)
    ivar = np.repeat((sigma**-2).astype(np.float32), grid.pixels, axis=1)
    bad = rng.random(flux.shape) < masked
    flux[bad], ivar[bad] = np.nan, 0
    return Spectra(np.arange(rows), flux, ivar, grid)


def fitted(settings: Pca, spectra: Spectra, sample: int = 50, pieces: int = 1) -> PcaDetector:
    detector = PcaDetector.assemble(settings, spectra.grid, [PcaDetector.grow(settings, spectra[:sample], 0, 0)])
    while detector.looking:
        parts = np.array_split(np.arange(len(spectra)), pieces)
        detector = detector.learn(reduce(add, [detector.look(spectra[part]) for part in parts]))
    return detector


# --- regions ----------------------------------------------------------------------------------------------------------


def test_menu_is_clipped_to_the_grid_and_windows_cover_it() -> None:
    regions = Regions.of(Pca(window=100.0), GRID, rest=True)
    edges = regions.edges(GRID)
    for (low, high), (first, last) in zip(MENU, edges, strict=False):
        inside = GRID.wave[(GRID.wave >= low) & (GRID.wave < high)]
        assert (first, last) == pytest.approx((max(low, 3595.8), high), abs=9)
        assert first < inside[0] <= inside[-1] < last
    windows = np.array(edges[len(MENU) :])
    assert np.ptp(windows, axis=1) == pytest.approx(100, abs=26)  # a pixel is 8 to 17 Å wide
    assert np.diff(windows[:, 0]).max() < 75
    assert windows[0, 0] == pytest.approx(GRID.edges[0], abs=1e-3)
    assert windows[-1, 1] == pytest.approx(GRID.edges[-1], abs=1e-3)
    covered = np.zeros(300, bool)
    for start, stop in zip(regions.starts[len(MENU) :], regions.stops[len(MENU) :], strict=True):
        covered[start:stop] = True
    assert covered.all()


def test_regions_follow_the_settings() -> None:
    assert len(Regions.of(Pca(window=None), GRID, rest=True)) == len(MENU)
    assert len(Regions.of(Pca(window=None, regions=((5000.0, 5100.0),)), GRID, rest=True)) == 1
    late = WaveGrid("linear", 4141.0, 2.0, 700)  # five pixels in the first of the menu, four without the first
    assert Regions.of(Pca(window=None), late, rest=True).widths[0] == 5
    later = WaveGrid("linear", 4143.0, 2.0, 700)
    assert Regions.of(Pca(window=None), later, rest=True).edges(later)[0][0] == pytest.approx(4150, abs=2)
    windows = Regions.of(Pca(window=500.0), GRID, rest=False)
    assert len(windows) == len(Regions.of(Pca(window=500.0), GRID, rest=True)) - len(MENU)
    both = Regions.of(Pca(window=500.0, regions=((5000.0, 5100.0), (5000.0, 5100.0))), GRID, rest=False)
    assert len(both) == len(windows) + 1, "the same region twice is one region"
    assert Regions.of(Pca(window=1e6), GRID, rest=False).edges(GRID) == [pytest.approx([3595.8, 7208.4], abs=0.1)]


@pytest.mark.parametrize(
    ("settings", "rest"),
    [
        (Pca(regions=((8000.0, 9000.0),)), True),
        (Pca(regions=((5100.0, 5000.0),)), True),
        (Pca(window=None), False),
        (Pca(window=0.001), False),
    ],
)
def test_no_region_is_refused_before_any_work(settings: Pca, rest: bool, rng: np.random.Generator) -> None:
    spectra = survey(rng, 5)
    if not rest:
        spectra = Spectra(spectra.rows, spectra.flux, spectra.ivar, GRID, np.zeros(5))
    with pytest.raises(ConfigError, match="change `regions`|widen `window`"):
        PcaDetector.grow(settings, spectra, 0, 0)


def test_sums_over_regions_are_not_spoiled_by_a_huge_neighbour(rng: np.random.Generator) -> None:
    regions = Regions(np.array([0, 5, 2, 8]), np.array([5, 10, 8, 12]), 12)
    values = rng.random((7, 12))
    values[3, 6] = 1e60
    expected = np.stack(
        [values[:, a:b].sum(axis=1) for a, b in zip(regions.starts, regions.stops, strict=True)], axis=1
    )
    np.testing.assert_allclose(regions.sums(values), expected, rtol=1e-14)


# --- how rare a value is ----------------------------------------------------------------------------------------------

sizes = st.lists(st.floats(0, 1e30), min_size=1, max_size=80)


@hypothesis_settings(deadline=None, max_examples=60)
@given(sizes, st.lists(st.floats(0, 1e35), min_size=2, max_size=40))
def test_surprise_never_falls_with_the_value(known: list[float], asked: list[float]) -> None:
    rarity = Rarity.of(np.array(known)[:, None])
    surprise = rarity.surprise(np.sort(asked)[:, None])[:, 0]
    assert np.isfinite(surprise).all()
    assert (np.diff(surprise) >= 0).all()
    assert surprise[0] >= 0
    # Continuous: nothing jumps when a value grows by a millionth.
    nudged = rarity.surprise(np.sort(asked)[:, None] * (1 + 1e-6))[:, 0]
    assert (nudged - surprise).max() < 0.01


def test_surprise_is_the_share_of_values_as_large(rng: np.random.Generator) -> None:
    values = rng.lognormal(0, 1, 20_000)
    rarity = Rarity.of(values[:, None])
    for x in (0.1, 1.0, 3.0, 8.0):
        share = (np.count_nonzero(values >= x) + 1) / 20_001
        assert rarity.surprise(np.array([[x]]))[0, 0] == pytest.approx(-np.log10(share), abs=0.02)
    assert rarity.surprise(np.array([[values.min() / 2]]))[0, 0] == 0


def test_tail_continues_a_power_law_with_its_own_index(rng: np.random.Generator) -> None:
    values = rng.pareto(2.0, 100_000) + 1  # P(≥ x) = x^-2
    rarity = Rarity.of(values[:, None])
    x = np.array([1e2, 1e4, 1e6, 1e20])
    surprise = rarity.surprise(x[:, None])[:, 0]
    np.testing.assert_allclose(surprise, 2 * np.log10(x), rtol=0.1)
    # An outlier of the survey itself is rarer than one in so many.
    lone = Rarity.of(np.append(values, 1e9)[:, None]).surprise(np.array([[1e9]]))[0, 0]
    assert lone > 12


def test_a_light_tail_is_counted_as_far_as_there_are_values(rng: np.random.Generator) -> None:
    values = np.sort(rng.normal(1, 0.1, 20_000) ** 2)
    rarity = Rarity.of(values[:, None])
    x = values[-20]  # twenty of 20,000 are as large; a power law would have more
    assert rarity.surprise(np.array([[x]]))[0, 0] == pytest.approx(3, abs=0.15)
    # Beyond all values no two tie.
    assert (np.diff(rarity.surprise(np.array([[3.0], [3.1], [30.0]]))[:, 0]) > 0.01).all()


def test_counts_add_up_and_leave_out_nan(rng: np.random.Generator) -> None:
    values = rng.lognormal(0, 5, (100, 4))
    values[::3, 1], values[:, 2] = np.nan, np.nan
    values[0, 3], values[1, 3] = 0, 1e300
    whole = Rarity.of(values)
    merged = reduce(add, [Rarity.of(part) for part in np.array_split(values, 7)], Rarity.zero(4))
    np.testing.assert_array_equal(merged.counts, whole.counts)
    assert whole.counts.sum(axis=1).tolist() == [100, 66, 0, 100]
    surprise = whole.surprise(values)
    np.testing.assert_array_equal(np.isnan(surprise), np.isnan(values))
    assert not whole.surprise(np.full((1, 4), 1e30))[0, 2]  # nothing is known of the third


# --- chi-squared ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", FIT, ids=["global", "local", "unweighted"])
def test_chi2_of_a_region_is_what_scikit_learn_leaves_there(choice: Pca, rng: np.random.Generator) -> None:
    spectra = survey(rng, masked=0)
    flux = spectra.flux.astype(np.float64)
    detector = fitted(choice, spectra)
    found = detector.region_chi2(spectra)
    whole = PCA(3, svd_solver="full").fit(flux)
    for number, (start, stop) in enumerate(zip(detector.regions.starts, detector.regions.stops, strict=True)):
        rest = (flux - whole.inverse_transform(whole.transform(flux)))[:, start:stop]
        if choice.fit == "local":
            part = flux[:, start:stop]
            model = PCA(min(3, (stop - start) // 2), svd_solver="full").fit(part)
            rest = part - model.inverse_transform(model.transform(part))
        weight = 1.0 if choice.weight == "none" else spectra.ivar[:, start:stop].astype(np.float64)
        np.testing.assert_allclose(found[:, number], (weight * rest**2).mean(axis=1), rtol=1e-6)


def test_a_known_residual_has_a_known_chi2() -> None:
    grid = WaveGrid("linear", 4000.0, 2.0, 40)
    flux = np.ones((30, 40), np.float32)
    spectra = Spectra(np.arange(30), flux, np.full_like(flux, 25), grid)
    settings = Pca(regions=((4000.0, 4020.0), (4020.0, 4080.0)), window=None)
    detector = fitted(settings, spectra)
    odd = Spectra(np.arange(2), flux[:2].copy(), spectra.ivar[:2].copy(), grid)
    odd.flux[:, :5] = 3
    odd.ivar[1, :4] = 0
    # Constant spectra have no component, so that 2 is left: 25 x 2² in 5 of 10 pixels, then in 1 of 6; 5 and 1 of all.
    expected = [[50, 0, 12.5], [100 / 6, 0, 100 / 36]]
    np.testing.assert_allclose(detector.region_chi2(odd), expected)
    assert detector.facts == {"regions": [[3999.0, 4019.0], [4019.0, 4079.0]], "components": 0, "explained": 0.0}
    odd.ivar[1, :9] = 0  # one good pixel of ten
    np.testing.assert_array_equal(detector.region_chi2(odd)[1], [np.nan, 0, 0])


def plant(kind: str, wave: np.ndarray, centre: float) -> np.ndarray:
    if kind == "step":
        return 0.15 * (np.abs(wave - centre) < 150)
    width, height = {"line": (15.0, 0.6), "absorption": (15.0, -0.5), "broad": (60.0, 0.25), "spike": (2.0, 3.0)}[kind]
    return np.asarray(height * np.exp(-0.5 * ((wave - centre) / width) ** 2))


@pytest.mark.parametrize("settings", FIT, ids=["global", "local", "unweighted"])
@pytest.mark.parametrize("kind", ["line", "absorption", "broad", "step", "spike"])
def test_the_region_of_what_was_planted_decides(kind: str, settings: Pca, rng: np.random.Generator) -> None:
    spectra = survey(rng)
    detector = fitted(settings, spectra)
    usual = detector.score(spectra)
    for centre in (GRID.wave[60], GRID.wave[200], GRID.wave[285]):
        odd = spectra[:10]
        flux = odd.flux + plant(kind, GRID.wave, centre).astype(np.float32)
        details = detector.details(Spectra(odd.rows, flux, odd.ivar, GRID))
        low, high = np.array(detector.facts["regions"])[details["region"]].T
        near = (
            (low - 150 <= centre) & (centre <= high + 150)
            if kind in ("step", "broad")
            else ((low <= centre + 30) & (centre - 30 <= high))
        )
        assert near.mean() >= 0.9, f"{kind} at {centre:.0f} Å, found in {low} to {high}"
        assert np.median(details["pca"]) > np.quantile(usual, 0.97)


def test_a_weak_narrow_line_shows_in_a_region_and_not_in_the_whole(rng: np.random.Generator) -> None:
    grid = WaveGrid.between("log", 3600.0, 7200.0, 1_000)
    spectra = survey(rng, 500, grid=grid)
    detector = fitted(Pca(components=3), spectra)
    odd = spectra[np.arange(50)]
    odd.flux[:, 600:606] += 5 / np.sqrt(odd.ivar.max(axis=1, keepdims=True))
    details = detector.details(odd)
    low, high = np.array(detector.facts["regions"])[details["region"]].T
    assert ((low < grid.wave[605]) & (grid.wave[600] < high)).mean() > 0.9
    # The few oddest spectra of the survey, by the score and by chi2 of the whole: how many lines are among such?
    seen = (details["pca"] > np.quantile(detector.score(spectra), 0.98)).mean()
    seen_by_whole = (detector.region_chi2(odd)[:, -1] > np.quantile(detector.region_chi2(spectra)[:, -1], 0.98)).mean()
    assert seen > 0.8
    assert seen_by_whole < 0.2


def test_details_agree_with_the_scores_of_regions(rng: np.random.Generator) -> None:
    spectra = survey(rng, 100)
    spectra.ivar[4, 100:] = 0
    detector = fitted(FIT[0], spectra)
    details = detector.details(spectra)
    scores = detector.region_scores(spectra)
    assert scores.dtype == np.float32
    assert np.isnan(scores[4]).any()
    np.testing.assert_array_equal(details["pca"], np.nanmax(scores, axis=1))
    np.testing.assert_array_equal(details["region"], np.nanargmax(scores, axis=1))
    chi2 = detector.region_chi2(spectra)[np.arange(100), details["region"]]
    np.testing.assert_allclose(details["region_chi2"], chi2, rtol=1e-6)
    assert {name: (array.dtype.str[1:], array.shape[1:]) for name, array in details.items()} == detector.fields
    np.testing.assert_array_equal(detector.score(spectra), details["pca"])


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", FIT, ids=["global", "local", "unweighted"])
def test_masked_pixels_may_hold_anything(settings: Pca, rng: np.random.Generator) -> None:
    spectra = survey(rng, 120)
    flux = spectra.flux.copy()
    bad = spectra.ivar == 0
    flux[bad] = rng.choice(np.array([0, np.inf, 1e30, -3e38], np.float32), bad.sum())
    dirty = Spectra(spectra.rows, flux, spectra.ivar, GRID)
    one, two = fitted(settings, spectra), fitted(settings, dirty)
    for name, values in one.details(spectra).items():
        np.testing.assert_array_equal(two.details(dirty)[name], values)


@pytest.mark.parametrize("settings", FIT, ids=["global", "local", "unweighted"])
def test_nothing_depends_on_how_the_survey_was_cut(settings: Pca, rng: np.random.Generator) -> None:
    spectra = survey(rng, 150)
    whole = fitted(settings, spectra)
    scores = whole.score(spectra)
    for pieces in (2, 7):
        np.testing.assert_allclose(fitted(settings, spectra, pieces=pieces).score(spectra), scores, atol=1e-6)
    one_by_one = np.concatenate([whole.score(spectra[row : row + 1]) for row in range(20)])
    np.testing.assert_allclose(one_by_one, scores[:20], atol=1e-6)
    np.testing.assert_allclose(whole.score(spectra[::-1]), scores[::-1], atol=1e-6)


@pytest.mark.parametrize("settings", FIT, ids=["global", "local", "unweighted"])
def test_huge_fluxes_have_finite_scores(settings: Pca, rng: np.random.Generator) -> None:
    spectra = survey(rng, 100, masked=0)
    spectra.flux[3, 150], spectra.flux[9] = 1e30, -3e38
    spectra.ivar[9] = 1e38
    detector = fitted(settings, spectra)
    details = detector.details(spectra)
    assert all(np.isfinite(values).all() for values in details.values())
    assert details["region_chi2"][9] == np.finfo(np.float32).max
    odder = spectra.flux[[20, 20, 20]]
    odder[:, 150] = [1e5, 1e10, 1e30]
    scores = detector.score(Spectra(np.arange(3), odder, spectra.ivar[[20, 20, 20]], GRID))
    assert (np.diff(scores) > 1).all(), "a far larger residual is a far larger score"


@pytest.mark.parametrize("fit", ["global", "local"])
def test_spectra_with_few_good_pixels(fit: Any, rng: np.random.Generator) -> None:
    spectra = survey(rng, 60)
    spectra.ivar[5] = 0
    spectra.ivar[6, 1:] = 0
    spectra.ivar[7, 6:] = 0
    for row, count in ((6, 1), (7, 6)):
        spectra.flux[row, :count], spectra.ivar[row, :count] = 1, 400
    detector = fitted(Pca(components=3, fit=fit, window=None, regions=((4000.0, 5000.0), (5000.0, 6000.0))), spectra)
    details = detector.details(spectra)
    assert np.isnan(details["pca"][5])
    assert np.isnan(details["region_chi2"][5])
    assert np.isfinite(np.delete(details["pca"], 5)).all()
    assert details["region"][5:8].tolist() == [-1, -1, -1]
    np.testing.assert_allclose(details["region_chi2"][6:8], detector.region_chi2(spectra)[6:8, -1], rtol=1e-6)
    assert (details["region"][:5] >= 0).all()


@pytest.mark.parametrize("fit", ["global", "local"])
def test_surveys_that_tell_nothing(fit: Any, rng: np.random.Generator) -> None:
    spectra = survey(rng, 40, masked=0)
    settings = Pca(components=500, fit=fit)
    flat = Spectra(spectra.rows, np.ones_like(spectra.flux), spectra.ivar, GRID)
    twins = Spectra(spectra.rows, spectra.flux[np.zeros(40, int)], spectra.ivar[np.zeros(40, int)], GRID)
    masked = Spectra(spectra.rows, spectra.flux, np.zeros_like(spectra.ivar), GRID)
    for same in (flat, twins):
        detector = fitted(settings, same)
        scores = detector.score(same)
        assert np.ptp(scores) == 0
        assert (detector.score(spectra[1:]) > scores[0]).all()
    assert np.isnan(fitted(settings, masked).score(masked)).all()
    assert np.isfinite(fitted(settings, masked).score(spectra)).all()
    for sample in (0, 1):
        assert np.isfinite(fitted(settings, spectra, sample=sample).score(spectra)).all()
    detector = fitted(settings, spectra)
    kept, widths = np.array(detector.facts["components"]), detector.regions.widths
    assert (kept == (39 if fit == "global" else np.minimum(widths // 2, 39))).all()  # 40 spectra span 39 dimensions
    assert detector.score(spectra[:0]).shape == (0,)


# --- the life of a detector -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", FIT, ids=["global", "local", "unweighted"])
def test_arrays_make_it_again_in_every_state(settings: Pca, rng: np.random.Generator) -> None:
    spectra = survey(rng, 80)
    arrays = PcaDetector.grow(settings, spectra, 1, 0)
    assert PcaDetector.parts(settings) == 1
    for states in range(3):
        detector = PcaDetector.from_arrays(settings, GRID, arrays)
        assert detector.looking == (states < 2)
        assert all(isinstance(array, np.ndarray) for array in arrays.values())
        again = detector.to_arrays()
        assert again.keys() == arrays.keys()
        for name, values in arrays.items():
            np.testing.assert_array_equal(again[name], values)
        if detector.looking:
            arrays = detector.learn(detector.look(spectra)).to_arrays()
    np.testing.assert_array_equal(detector.score(spectra), fitted(settings, spectra, sample=80).score(spectra))
    other = Pca(components=3, regions=((4000.0, 5000.0),))
    with pytest.raises(ValueError, match="array 'runs'"):
        PcaDetector.from_arrays(other, GRID, arrays)


DAMAGE = {
    "counts": [lambda a: -a, lambda a: a + 2**50, lambda a: a[:-1], lambda a: a.astype(float)],
    "runs": [lambda a: a + 1, lambda a: a[1:]],
    "rest": [lambda a: a.astype(np.int64), lambda a: ~a],
    "reach": [lambda a: a * 0, lambda a: a * np.nan],
    "shift": [lambda a: a[1:]],
    "mean": [lambda a: a[1:], lambda a: a * np.inf],
    "3.axes": [lambda a: a * 2, lambda a: a[:, 1:]],
    "3.values": [lambda a: a[::-1].copy()],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_arrays_are_refused(name: str, rng: np.random.Generator) -> None:
    whole = fitted(FIT[1], survey(rng, 60)).to_arrays()
    for change in DAMAGE[name]:
        with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=r"\w"):
            PcaDetector.from_arrays(FIT[1], GRID, whole | {name: change(whole[name])})
    for arrays in ({k: v for k, v in whole.items() if k != name}, whole | {"more": whole[name]}):
        if arrays.keys() != whole.keys() - {"counts"}:  # that is a detector before its second look
            with pytest.raises(ValueError, match=r"array"):
                PcaDetector.from_arrays(FIT[1], GRID, arrays)


def test_misuse_is_told(rng: np.random.Generator) -> None:
    spectra = survey(rng, 30)
    detector = PcaDetector.assemble(FIT[0], GRID, [PcaDetector.grow(FIT[0], spectra, 0, 0)])
    for ask in (detector.score, detector.region_chi2):
        with pytest.raises(ValueError, match="learn"):
            ask(spectra)
    first = detector.look(spectra)
    second = detector.learn(first)
    with pytest.raises(ValueError, match="components are known"):
        second.learn(first)
    with pytest.raises(ValueError, match="expected those of its own look"):
        detector.learn(second.look(spectra))
    ready = second.learn(second.look(spectra))
    with pytest.raises(ValueError, match="needs no look"):
        ready.look(spectra)
    foreign = survey(rng, 5, grid=WaveGrid.between("log", 3600.0, 7000.0, 300))
    for ask in (detector.look, ready.score, ready.region_chi2):
        with pytest.raises(LayoutError, match="fit it on these spectra"):
            ask(foreign)
