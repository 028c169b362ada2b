import numpy as np
import pytest

from distspec.spectra import LIGHT_SPEED, WaveGrid
from distspec.spectra.lines.diagnosis import cluster_sentence, frame_of_peaks, regions, sentence
from distspec.spectra.lines.fits import LINES
from distspec.spectra.lines.ratios import bpt, decrement, kauffmann, kewley, schawinski
from distspec.spectra.lines.tables import RATIOS, Indices, LineTable, ratios

GRID = WaveGrid.between("log", 3600.0, 7200.0, 2000)
REFERENCE = {"H alpha": 286.0, "H beta": 100.0}


def table_of(rows: list[dict[str, float]], error: float = 1.0, continuum: float = 10.0) -> LineTable:
    """Fluxes by name, all with the same error, over a flat continuum."""
    table = LineTable.empty(len(rows))
    for row, fluxes in enumerate(rows):
        for name, flux in fluxes.items():
            column = LINES.index(name)
            table.flux[row, column], table.flux_error[row, column] = flux, error
            table.width[row, column], table.width_error[row, column] = flux / continuum, error / continuum
            table.continuum[row, column] = continuum
    return table


def indices_of(count: int, d4000: float = np.nan, h_delta: float = np.nan) -> Indices:
    full = [np.full(count, value) for value in (d4000, 0.02, h_delta, 0.8)]
    return Indices(*full)


def at(o3: float, n2: float, s2: float = np.nan, o1: float = np.nan) -> dict[str, float]:
    """Fluxes of given logarithms of ratios."""
    fluxes = REFERENCE | {"[O III] 5008": 100 * 10**o3, "[N II] 6585": 286 * 10**n2}
    if np.isfinite(s2):
        fluxes |= {"[S II] 6718": 286 * 10**s2 * 0.6, "[S II] 6733": 286 * 10**s2 * 0.4}
    return fluxes | ({"[O I] 6302": 286 * 10**o1} if np.isfinite(o1) else {})


def peak(wave: float, height: float = 1.0, width: float = 3.0) -> np.ndarray:
    return np.asarray(height * (abs(GRID.wave - wave) < width))


def test_ratios_and_their_errors() -> None:
    row = at(0.5, -0.4, -0.6, -1.2) | {"[O II] 3727+3730": 200.0}
    found = ratios(table_of([row]), absorption=0.0)
    for name, expected in {"O3": 0.5, "N2": -0.4, "S2": -0.6, "O1": -1.2, "O3N2": 0.9}.items():
        assert found.of(name)[0][0] == pytest.approx(expected), name
    assert found.of("O3O2")[0][0] == pytest.approx(np.log10(10**2.5 / 200))
    rng = np.random.default_rng(3)
    drawn = table_of([row] * 4000)
    drawn.flux[:] += rng.normal(size=drawn.flux.shape)
    many = ratios(drawn, absorption=0.0)
    for name in RATIOS:
        assert many.of(name)[0].std() == pytest.approx(found.of(name)[1][0], rel=0.06), name


def test_a_ratio_of_what_is_not_seen_is_a_limit() -> None:
    rows = [at(0.5, -0.4) | {"[N II] 6585": 2.0}, at(0.5, -0.4) | {"H beta": -4.0}, REFERENCE]
    found = ratios(table_of(rows), absorption=0.0)
    assert np.isnan(found.of("N2")[0][0]) and found.upper[0, 1] and not found.lower[0, 1]
    assert found.limit[0, 1] == pytest.approx(np.log10(3 / 286))
    assert found.lower[1, 0] and found.limit[1, 0] == pytest.approx(np.log10(10**2.5 / 3))
    assert np.isnan(found.value[2]).all() and not (found.upper[2] | found.lower[2]).any()


def test_stellar_absorption_moves_weak_lines_only_and_by_its_error() -> None:
    weak = {name: flux * 0.1 for name, flux in at(0.5, -0.4).items()}
    found = ratios(table_of([at(0.5, -0.4), weak, weak], error=0.1))
    assert found.of("O3")[0][0] == pytest.approx(0.5 - np.log10(1.1))  # 1 Å to 10 Å
    assert found.of("O3")[0][1] == pytest.approx(0.5 - np.log10(2.0))
    assert found.of("O3")[1][1] == pytest.approx(0.5 / np.log(10), rel=0.35)


def test_curves_are_the_published_ones() -> None:
    x = np.array([-1.0, -0.5, 0.0, 0.04, 0.05, 0.3, 0.46, 0.47, 1.0])
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(kauffmann(x)[:4], 0.61 / (x[:4] - 0.05) + 1.3)
    assert np.isnan(kauffmann(x)[4:]).all() and np.isnan(kewley(x)[7:]).all()
    assert kewley(0.0) == pytest.approx(-0.108, abs=1e-3) and kewley(-1.0) == pytest.approx(0.775, abs=1e-3)
    assert schawinski(0.0) == 0.45


@pytest.mark.parametrize(
    ("o3", "n2", "s2", "expected"),
    [
        (0.3, -0.7, -0.5, "star-forming"),
        (-0.5, -0.4, -0.5, "star-forming"),
        (0.0, -0.2, -0.4, "composite"),
        (1.0, 0.0, -0.2, "Seyfert"),
        (1.0, 0.0, np.nan, "Seyfert"),
        (0.3, 0.2, 0.1, "LINER"),
        (0.3, 0.2, np.nan, "LINER"),
        (0.6, 0.3, -0.4, "Seyfert"),  # [S II] decides, and [N II] says otherwise
        (0.6, 0.3, np.nan, "LINER"),
        (0.5, 0.6, 0.2, "LINER"),  # beyond both asymptotes
    ],
)
def test_known_points_of_the_diagram(o3: float, n2: float, s2: float, expected: str) -> None:
    found = bpt(ratios(table_of([at(o3, n2, s2)], error=0.2), absorption=0.0))
    assert found.names[0] == expected
    assert found.probability[0] > 0.8


def test_without_nitrogen_only_what_no_starburst_reaches_has_a_class() -> None:
    rows = [at(1.25, 0.0), at(1.0, 0.0), at(1.25, 0.0, -0.2)]
    table = table_of(rows)
    table.flux[:, LINES.index("[N II] 6585")] = np.nan
    assert bpt(ratios(table, absorption=0.0)).names.tolist() == ["AGN", "", "Seyfert"]


def test_a_class_is_as_probable_as_its_line_is_far() -> None:
    n2 = -0.3
    rows = [at(float(kauffmann(n2)) + shift, n2) for shift in (0.001, -0.001, -0.3)]
    found = bpt(ratios(table_of(rows, error=5.0), absorption=0.0))
    assert found.names.tolist() == ["composite", "star-forming", "star-forming"]
    assert 0.35 < found.probability[0] < 0.65 and 0.35 < found.probability[1] < 0.65
    assert found.probability[2] > 0.9
    alone = bpt(ratios(table_of(rows[1:2], error=5.0), absorption=0.0))
    assert alone.probability[0] == found.probability[1]


def test_the_decrement_tells_of_dust() -> None:
    rows = [{"H alpha": 620.0, "H beta": 100.0}, REFERENCE, {"H alpha": 100.0, "H beta": 2.0}]
    found = decrement(table_of(rows), absorption=0.0)
    np.testing.assert_allclose(found.ratio[:2], [6.2, 2.86])
    np.testing.assert_allclose(found.ebv[:2], [0.661, 0.0], atol=0.002)
    assert found.error[0] == pytest.approx(6.2 * np.hypot(1 / 620, 1 / 100))
    assert np.isnan(found.ratio[2]) and np.isnan(found.ebv[2])
    # An attenuation of Calzetti's law with this E(B-V) gives the ratio back.
    assert 2.86 * 10 ** (0.4 * found.ebv[0] * (4.60 - 3.33)) == pytest.approx(6.2)


def test_peaks_agree_in_the_frame_in_which_they_are_made(rng: np.random.Generator) -> None:
    z = rng.uniform(0.02, 0.3, 80)
    scatter = 1 + rng.normal(size=80) * 100 / LIGHT_SPEED
    rest = frame_of_peaks(5008.24 * scatter, z)
    assert rest.frame == "rest" and rest.place == pytest.approx(5008.24, abs=1) and 60 < rest.rest < 150
    sky = frame_of_peaks(5578.89 * scatter / (1 + z), z)
    assert sky.frame == "observed" and sky.place == pytest.approx(5578.89, abs=1) and sky.rest > 10_000
    assert frame_of_peaks(5008.24 * scatter, np.full(80, 0.1)).frame == ""
    assert frame_of_peaks(rng.uniform(4000, 7000, 80), z).frame == ""
    assert frame_of_peaks(np.full(3, 5008.24), z[:3]).frame == ""


def test_regions_are_merged_ranked_and_named() -> None:
    weights = peak(5008.24, 1.0) - peak(6564.61, 0.6) + peak(4500.0, 0.02)
    weights[abs(GRID.wave - 5008.24) < 1.0] = 0.0  # a gap inside
    found = regions(weights, GRID)
    assert [region.lines for region in found] == [("[O III] 5008",), ("H alpha",)]
    assert found[0].weight > 0 > found[1].weight
    assert found[0].share > found[1].share and 0.9 < found[0].share + found[1].share < 1
    assert found[0].low == pytest.approx(5005.2, abs=2) and found[0].high == pytest.approx(5011.2, abs=2)
    assert all(not region.doubts for region in found)
    assert regions(np.zeros(GRID.pixels), GRID) == () and regions(np.full(GRID.pixels, np.nan), GRID) == ()


def test_regions_of_segments_name_what_lies_inside() -> None:
    weights = np.where((GRID.wave > 6530) & (GRID.wave < 6610), 1.0, 0.01)
    (found,) = regions(weights, GRID)
    assert set(found.lines) == {"H alpha", "[N II] 6550", "[N II] 6585"}


@pytest.mark.parametrize(
    ("wave", "z", "expected"),
    [
        (5578.89 / 1.2, 0.2, ("at the sky line 5577",)),
        (6302.05 / 1.1, 0.1, ("at the sky line 6300",)),
        (7650.0 / 1.3, 0.3, ("in the telluric band 7590-7720 Å",)),
        (5578.89 / 1.2, np.nan, ()),
        (5578.89 / 1.2, 0.22, ()),
        (3601.0, 0.0, ("at the end of the grid",)),
        (4001.0, 0.0, ("at the end of the good pixels",)),
        (3900.0, 0.0, ("without a good pixel",)),
    ],
)
def test_what_may_be_an_artefact_is_said(wave: float, z: float, expected: tuple[str, ...]) -> None:
    good = np.ones(GRID.pixels, bool) if wave != 4001.0 else GRID.wave > 4000
    if wave == 3900.0:
        good[(GRID.wave > 3880) & (GRID.wave < 3920)] = False
    (found,) = regions(peak(wave), GRID, z=z, good=good)
    assert found.doubts == expected


def test_on_an_observed_grid_lines_move_and_the_sky_stays() -> None:
    (line,) = regions(peak(5008.24 * 1.2), GRID, redshift=0.2, z=0.2)
    assert line.lines == ("[O III] 5008",) and not line.doubts and line.observed
    (sky,) = regions(peak(5578.89), GRID, redshift=0.3, z=0.3)
    assert sky.doubts == ("at the sky line 5577",)
    (unknown,) = regions(peak(5008.24), GRID, redshift=np.nan, z=np.nan)
    assert unknown.lines == () and not unknown.break_


def test_the_sentence_of_extreme_lines() -> None:
    table = table_of([at(1.0, -0.05, -0.2)], error=12.0, continuum=1.0)
    table.flux[:, LINES.index("[O III] 5008")] = 1000.0
    table.width[:, LINES.index("[O III] 5008")] = 320.0
    found = sentence(peak(5008.24), GRID, None, 0.05, table, indices_of(1), ratios(table))
    start = "The explanation points at 5005-5011 Å at rest (100 % of the weight, at [O III] 5008)."
    assert found.text.startswith(start + " EW([O III] 5008) = 320 ± 12 Å: extreme emission lines. EW(H alpha) = 286")
    assert "Line ratios like those of a Seyfert nucleus (log [N II]/Ha = −0.05 ± 0.03, log" in found.text


def test_the_sentence_of_dust_offsets_and_broad_lines() -> None:
    table = table_of([{"H alpha": 620.0, "H beta": 100.0}], error=12.0, continuum=4.0)
    table.velocity[0], table.velocity_error[0] = -800.0, 40.0
    table.broad_sigma[0], table.broad_sigma_error[0] = 2300.0, 120.0
    weights = np.zeros(GRID.pixels)
    found = sentence(weights, GRID, None, 0.05, table, indices_of(1), ratios(table))
    assert found.regions == ()
    assert found.text == (
        "Lines offset by −800 ± 40 km/s: redshift may be wrong. Broad Balmer lines "
        "(sigma 2,300 ± 120 km/s): possible view of a nucleus. Balmer decrement 6.0 ± 0.7: E(B-V) about 0.63 ± 0.11."
    )
    star = sentence(weights, GRID, None, 0.0001, table, indices_of(1), ratios(table))
    assert star.text == "No line or known region explains it."


def test_the_sentence_of_a_recent_burst_and_of_a_break() -> None:
    table, weights = table_of([{"H alpha": 300.0}]), peak(4050.0)
    burst = sentence(weights, GRID, None, 0.05, table, indices_of(1, 1.05, 6.1), ratios(table))
    assert "Dn4000 = 1.05 ± 0.02 and strong Hdelta absorption (6.1 ± 0.8 Å): suggests a recent burst." in burst.text
    quiet = sentence(weights, GRID, None, 0.05, table_of([{"H alpha": 3.0}]), indices_of(1, 1.3, 6.1), ratios(table))
    assert "may be past a burst" in quiet.text
    old = sentence(weights, GRID, None, 0.05, table, indices_of(1, 1.95, -1.0), ratios(table))
    assert "at the 4000 Å break" in old.text and "Dn4000 = 1.95 ± 0.02: suggests old stars." in old.text


def test_where_nothing_stands_out_that_is_said() -> None:
    table = table_of([{}])
    found = sentence(peak(5400.0), GRID, None, 0.01, table, indices_of(1), ratios(table))
    assert found.text.endswith("No line or known region explains it.") and found.findings == ()
    doubt = sentence(peak(5578.89), GRID, None, 0.0, table, indices_of(1), ratios(table))
    assert "at the sky line 5577: may be an artefact" in doubt.text and "No line" not in doubt.text
    with pytest.raises(ValueError, match="expected one"):
        sentence(peak(5400.0), GRID, None, 0.01, table_of([{}, {}]), indices_of(1), ratios(table))


def test_a_class_near_a_division_is_not_called_sure() -> None:
    n2 = -0.1
    table = table_of([at(float(kewley(n2)) + 0.02, n2, -0.1)], error=10.0, continuum=1.0)
    found = sentence(peak(6564.61), GRID, None, 0.05, table, indices_of(1), ratios(table))
    assert "within errors of the dividing line" in found.text


def test_a_cluster_is_told_by_medians_and_shares(rng: np.random.Generator) -> None:
    bright = [at(1.0, 0.0, -0.2) | {"[O III] 5008": 1000 + row} for row in range(61)]
    table = table_of(bright + [REFERENCE] * 17, continuum=5.0)
    z = rng.uniform(0.02, 0.3, 78)
    found = cluster_sentence(peak(5008.24), GRID, table, indices_of(78), ratios(table), z, np.full(78, 5008.24))
    assert "61 of 78 members have [O III] 5008 at > 5 sigma; median EW 206 Å, 68 % within 202 to 210 Å" in found.text
    assert "of 78 members: 61 Seyfert, 17 unknown" in found.text
    assert "artefact" not in found.text
    sky = cluster_sentence(peak(5008.24), GRID, table, indices_of(78), ratios(table), z, 5578.89 / (1 + z))
    assert sky.findings[0].startswith("explanations agree at 5579 Å as observed")
    assert sky.findings[0].endswith("at the sky line 5577: possible artefact")


def test_a_cluster_on_an_observed_grid_names_lines_at_one_redshift_only(rng: np.random.Generator) -> None:
    table, weights = table_of([at(1.0, 0.0)] * 20), peak(5008.24 * 1.1)
    alike = cluster_sentence(weights, GRID, table, indices_of(20), ratios(table), np.full(20, 0.1), rest=False)
    assert alike.regions[0].lines == ("[O III] 5008",)
    z = rng.uniform(0.0, 0.3, 20)
    mixed = cluster_sentence(weights, GRID, table, indices_of(20), ratios(table), z, np.full(20, 5509.0), rest=False)
    assert mixed.regions[0].lines == () and "possible artefact" in mixed.text
    none = cluster_sentence(weights, GRID, table, indices_of(20), ratios(table), np.full(20, np.nan), rest=False)
    assert none.regions[0].lines == ()
