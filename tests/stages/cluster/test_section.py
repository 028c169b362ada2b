"""What the report says of clusters, from their JSON alone."""

import io
import json
import re
from typing import Any

import numpy as np
import pytest
from bokeh.models import Plot

from distspec.results.figures.kit import COLORS
from distspec.spectra import WaveGrid
from distspec.stages.cluster.section import SCHEMA, content, figures, picture
from distspec.stages.stage import Section
from tests.support.sections import rendered

PIXELS, REGIONS = 200, 20
GRID = WaveGrid("log", 4_000.0, 1e-3, PIXELS)


def one_cluster(label: int, size: int, **changes: Any) -> dict[str, Any]:
    """Describe a cluster with its weight at region 4 label + 3."""
    mean = np.full(REGIONS, 0.1)
    mean[4 * label + 3] = 1.0
    edges = GRID.edges[::10]
    low, high = float(edges[4 * label + 3]), float(edges[4 * label + 4])
    peak = {"low": low, "high": high, "top": (low + high) / 2, "value": 1.0, "signed": 0.95, "lines": ["H beta"]}
    spread = {"known": size, "quantiles": [0.02, 0.05, 0.1, 0.15, 0.19], "counts": [size, 0, 0, 0]}
    leaning = {"cluster": label, "known": size, "mean": 0.5, "p": 0.6}
    member = {"row": 7, "id": str(2**60 + 7), "rank": 2, "distance": 0.1}
    return {
        "label": label,
        "size": size,
        "share": size / 100,
        "silhouette": 0.4,
        "distance": 0.2,
        "weights": {"mean": mean.tolist(), "signed": (0.95 * mean).tolist()},
        "spectrum": {"mean": [None, *[1.0] * 198, 3.0], "median": [None, *[0.9] * 199], "of": size, "median_of": size},
        "peaks": [peak, peak | {"value": 0.4, "lines": []}],
        "moved": {"frame": "observed", "quantiles": [5_550.0, 5_570.0, 5_577.0, 5_590.0, 5_600.0]},
        "nearest": [member],
        "top": [member, member | {"id": str(2**60 + 8), "rank": 5}],
        "properties": {"z": spread | {"leaning": leaning}, "snr": spread | {"leaning": leaning}},
        "classes": {"GALAXY": size - 1, "": 1},
        "exposures": [],
        "text": None,
        "bpt": {"star-forming": 3},
    } | changes


def make_facts(**changes: Any) -> dict[str, Any]:
    every = {"edges": [0.0, 0.05, 0.1, 0.15, 0.2], "known": 100, "quantiles": [0, 0.05, 0.1, 0.15, 0.2]}
    every |= {"counts": [25, 25, 25, 25]}
    scores = {"rand": 0.62, "homogeneity": 0.7, "completeness": 0.8}
    table = {"spectra": 100, "kinds": ["", "lines"], **scores}
    facts = {
        "schema": SCHEMA,
        "store": "store",
        "frame": "rest",
        "grid": {"scale": GRID.scale, "first": GRID.first, "step": GRID.step, "pixels": GRID.pixels},
        "layer": "explain-lime",
        "model": "abc",
        "method": "lime",
        "score": "mse_trimmed",
        "settings": {"algorithm": "kmeans", "normalize": "l2", "signed": False},
        "explained": 103,
        "unknown": 2,
        "clustered": 101,
        "noise": 1,
        "notes": ["spectra without any weight, which are in no cluster: 1"],
        "edges": GRID.edges[::10].tolist(),
        "components": {"share": 0.9, "number": 12},
        "silhouette": 0.41,
        "sampled": None,
        "scan": {"k": [2, 3, 4], "inertia": [30.0, 20.0, 15.0], "silhouette": [0.3, 0.41, None]},
        "properties": {"z": every, "snr": every},
        "clusters": [one_cluster(0, 60), one_cluster(1, 30), one_cluster(2, 10)],
        "concentrations": {"kinds": [{"columns": ["plate", "mjd"], "labels": 9}], "tests": 3},
        "truth": {"all": table | {"table": [[50, 10], [0, 30], [10, 0]]}, "planted": {"spectra": 40, **scores}},
    } | changes
    plain: dict[str, Any] = json.loads(json.dumps(facts, allow_nan=False))
    return plain


def render(facts: dict[str, Any]) -> str:
    return rendered(
        Section("clusters", "cluster", "cluster/section.html.jinja", {"clustered": content(facts)}, figures(facts))
    )


def words(page: str) -> str:
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", "", page).replace("&nbsp;", " ").replace("\u00a0", " ").replace("&lt;", "<")
    return re.sub(r"\s+", " ", text.replace("&amp;", "&"))


@pytest.mark.slow
def test_the_page_tells_what_was_clustered_and_what_is_in_each() -> None:
    text = words(render(make_facts()))
    assert "Of the 103 spectra with the largest mse trimmed that lime explained, 101 were clustered by k-means" in text
    assert "absolute weights, divided by the length of their vector" in text
    assert "Left out for want of an explanation: 2. In no cluster: 1." in text
    assert "mean silhouette of 0.41 tells of a weak structure" in text
    assert "k = 3 has the largest mean silhouette, 0.41, of k = 2 to 4." in text
    assert "12 principal components hold 90 % of the variance" in text
    low, high = GRID.edges[70], GRID.edges[80]
    assert f"Most weight at {low:,.0f}–{high:,.0f} Å (H beta), then {low:,.0f}–{high:,.0f} Å." in text
    assert "The heaviest regions of members lie at 5,577 Å observed (5,570 to 5,590 Å)." in text
    assert "There the flux raises the score in nearly all members." in text
    assert "Classes: GALAXY 59, unknown 1." in text
    assert str(2**60 + 7) in text and f"6: {2**60 + 8}" in text
    assert "adjusted Rand index is 0.62" in text and "not planted" in text
    assert "More than chance brings" not in text and "Redshifts keep to a part" not in text


def test_every_figure_is_drawn_once() -> None:
    drawn = figures(make_facts())
    expected = {"clusters-scan", "clusters-weights"}
    expected |= {f"cluster-{label}{part}" for label in range(3) for part in ("", "-z", "-snr")}
    assert set(drawn) == expected
    spectrum, weights = sorted(drawn["cluster-1"].select({"type": Plot}), key=lambda plot: -plot.height)
    lines = next(part.data_source.data for part in spectrum.renderers if "mean" in part.data_source.data)
    assert np.isnan(lines["mean"][0]) and lines["mean"][-1] == 3.0 and np.nanmin(lines["median"]) == 0.9
    assert spectrum.y_range.start < 0.9 and spectrum.y_range.end > 3.0
    assert (weights.y_range.start, weights.y_range.end) == (-1.08, 1.08)


def test_figures_hold_the_numbers_of_the_facts() -> None:
    facts = make_facts()
    drawn = figures(facts)
    scan = drawn["clusters-scan"].renderers[0].data_source.data
    np.testing.assert_allclose(scan["low"], [1, 20 / 30, 0.5])
    np.testing.assert_allclose(scan["high"], [0.3 / 0.41, 1, np.nan])
    cells = drawn["clusters-weights"].renderers[0].data_source.data
    np.testing.assert_allclose(
        np.reshape(cells["weight"], (3, REGIONS)), [one["weights"]["mean"] for one in facts["clusters"]], rtol=1e-6
    )
    np.testing.assert_allclose(cells["middle"][:REGIONS] - cells["width"][:REGIONS] / 2, GRID.edges[:-1:10], rtol=1e-6)
    bars = drawn["cluster-0-z"].renderers[0].data_source.data
    assert bars["top"].tolist() == [60, 0, 0, 0]
    np.testing.assert_allclose(bars["expected"], 15.0)


@pytest.mark.slow
def test_regions_as_narrow_as_pixels_are_joined_and_keep_their_peaks() -> None:
    narrow = one_cluster(0, 60)
    size = np.zeros(PIXELS)
    size[[3, 150]] = 1.0, 0.5
    narrow["weights"] = {"mean": size.tolist(), "signed": (-size).tolist()}
    wide = WaveGrid("log", 4_000.0, 1e-4, 4_000)
    big = one_cluster(1, 30)
    values = np.zeros(4_000)
    values[1_234] = 1
    big["weights"] = {"mean": values.tolist(), "signed": (-values).tolist()}
    grid = {"scale": wide.scale, "first": wide.first, "step": wide.step, "pixels": wide.pixels}
    big["spectrum"] = {"mean": [1.0] * 4_000, "median": [1.0] * 4_000, "of": 30, "median_of": 20}
    facts = make_facts(clusters=[big, big | {"label": 2}], grid=grid, edges=wide.edges.tolist(), truth=None)
    cells = figures(facts)["clusters-weights"].renderers[0].data_source.data
    assert len(cells["weight"]) == 2 * 250
    (place,) = np.flatnonzero(cells["weight"][:250])
    assert abs(cells["middle"][place] - wide.wave[1_234]) <= cells["width"][place] / 2
    assert "The median is that of 20 members" in words(render(facts))
    small = make_facts(clusters=[narrow, narrow | {"label": 1}], edges=GRID.edges.tolist())
    assert len(figures(small)["clusters-weights"].renderers[0].data_source.data["weight"]) == 2 * PIXELS


@pytest.mark.slow
def test_artefacts_are_pointed_at() -> None:
    held = {"columns": ["plate", "mjd"], "label": "plate <266>", "members": 25, "known": 30, "share": 25 / 30}
    held |= {"expected": 0.26, "p": 1e-12}
    leaning = {"cluster": 1, "known": 30, "mean": 0.5, "p": 1e-9}
    narrow = {"known": 30, "quantiles": [0.11, 0.115, 0.116, 0.117, 0.12], "counts": [0, 0, 30, 0], "leaning": leaning}
    odd = one_cluster(1, 30, exposures=[held, held | {"label": "plate 9", "p": 0.3}], text="Sky <b>line</b>.")
    odd["properties"]["z"] = narrow
    facts = make_facts(clusters=[one_cluster(0, 60), odd])
    first, second = content(facts)["cards"]
    assert (first["confined"], second["confined"]) == (False, True)
    assert [one["label"] for one in second["exposures"]] == ["plate <266>"]
    page = render(facts)
    text = words(page)
    assert "25 of 30 members have plate &lt;266&gt;, 83 % against 26 % of all (p = 1e−12)" in page.replace(
        "<b>", ""
    ).replace("</b>", "").replace("\u00a0", " ")
    assert "Redshifts keep to a part of those of all" in text and "plate 9" not in text
    assert "Sky &lt;b&gt;line" in page  # whatever a text holds, it is text
    # Leaning alone is not being confined.
    odd["properties"]["z"] = narrow | {"quantiles": [0.1, 0.11, 0.15, 0.19, 0.2]}
    assert not content(make_facts(clusters=[one_cluster(0, 60), odd]))["cards"][1]["confined"]
    # Nothing is known of the sky where spectra are as observed already.
    assert not content(facts | {"frame": "observed"})["cards"][1]["confined"]


@pytest.mark.parametrize(
    ("silhouettes", "told"),
    [
        ([0.5, 0.4, 0.3], "it is the least that was tried"),
        ([0.3, 0.4, 0.5], "it is the largest that was tried"),
        ([0.3, 0.5, 0.5], "k = 3 has"),
        ([None, None, None], None),
    ],
)
def test_what_the_choice_of_k_is_worth(silhouettes: list[float | None], told: str | None) -> None:
    choice = content(make_facts(scan={"k": [2, 3, 4], "inertia": [3.0, 2.0, 1.0], "silhouette": silhouettes}))["choice"]
    assert choice is None if told is None else told in choice
    assert told != "k = 3 has" or "tried" not in choice


@pytest.mark.slow
def test_one_cluster_of_nearly_all_is_said_to_tell_little() -> None:
    clusters = [one_cluster(0, 97), one_cluster(1, 3)]
    assert "97 % are in one cluster" in words(render(make_facts(clusters=clusters, truth=None)))
    assert content(make_facts(clusters=clusters[:1], truth=None))["dominant"] is None
    assert content(make_facts())["dominant"] is None


def test_negative_silhouettes_stay_on_the_axis() -> None:
    scan = {"k": [2, 3, 4], "inertia": [3.0, 2.0, 1.0], "silhouette": [0.2, -0.1, None]}
    plot = figures(make_facts(scan=scan))["clusters-scan"]
    assert (plot.y_range.start, plot.y_range.end) == (-0.5, 1.05)


def test_signs_of_members_that_differ_are_told() -> None:
    cards = []
    for signed in (0.9, -0.9, 0.2):
        one = one_cluster(0, 5)
        one["peaks"][0]["signed"] = signed
        cards.append(content(make_facts(clusters=[one]))["cards"][0]["sign"])
    assert cards == ["raises", "lowers", "mixed"]


def test_weights_that_are_everywhere_have_no_place() -> None:
    one = one_cluster(0, 5)
    one["peaks"] = [one["peaks"][0] | {"low": GRID.edges[20], "high": GRID.edges[170], "lines": []}]
    text = words(render(make_facts(clusters=[one], truth=None)))
    assert "Most weight at all wavelengths alike." in text
    assert "There the flux" not in text and "heaviest regions" not in text


def test_backgrounds_are_tinted_by_the_sign_that_members_agree_on() -> None:
    one = one_cluster(0, 5)
    signed = np.array(one["weights"]["mean"])
    signed[0], signed[1] = -signed[0], 0.0
    one["weights"]["signed"] = signed.tolist()
    plots = figures(make_facts(clusters=[one], truth=None))["cluster-0"].select({"type": Plot})
    strips = [part for plot in plots for part in plot.renderers if "fill_alpha" in part.data_source.data]
    (data,) = [part.data_source.data for part in strips]
    assert data["fill_color"][:4] == [COLORS[name] for name in ("lowers", "count", "raises", "raises")]
    np.testing.assert_allclose(data["fill_alpha"][:4], [0.045, 0.045, 0.045, 0.45])


@pytest.mark.slow
def test_of_very_many_clusters_the_page_shows_the_largest() -> None:
    clusters = [one_cluster(label % 4, 5) | {"label": label} for label in range(60)]
    for one in clusters[2:]:
        one["weights"] = one["spectrum"] = None
    facts = make_facts(clusters=clusters, truth=None, scan=None)
    shown = content(facts)
    assert (len(shown["rows"]), shown["more"], len(shown["cards"])) == (40, 20, 2)
    assert "… and 20 smaller ones." in words(render(facts))


@pytest.mark.slow
@pytest.mark.parametrize("frame", ["rest", "observed"])
def test_little_is_known_of_little(frame: str) -> None:
    nothing = {"known": 0, "quantiles": None, "counts": [0, 0]}
    leaning = {"cluster": 0, "known": 0, "mean": None, "p": None}
    axis = {"edges": [0.0, 0.5, 1.0]} | nothing
    bare = one_cluster(0, 1, peaks=[], moved=None, classes=None, silhouette=None)
    bare["spectrum"] = {"mean": [None] * PIXELS, "median": [None] * PIXELS, "of": 1, "median_of": 1}
    bare["weights"] = {"mean": [0.0] * REGIONS, "signed": [0.0] * REGIONS}
    bare["properties"] = {"z": nothing | {"leaning": leaning}}
    facts = make_facts(
        clusters=[bare], scan=None, silhouette=None, properties={"z": axis}, truth=None, notes=[], frame=frame
    )
    text = words(render(facts))
    assert "Most weight at –." in text and "structure" not in text
    none = make_facts(clusters=[], scan=None, silhouette=None, truth=None, noise=101)
    assert "No cluster was found." in words(render(none)) and figures(none) == {}
    for told in (facts, none):
        picture(told).savefig(io.BytesIO(), format="png")


def test_the_picture_shows_all_clusters_and_the_scan() -> None:
    drawn = picture(make_facts())
    upper, lower = drawn.axes
    assert len(upper.lines) == 2 and upper.get_xlabel() == "k"
    assert [text.get_text() for text in lower.get_yticklabels()] == ["0", "1", "2"]
    stream = io.BytesIO()
    drawn.savefig(stream, format="png")
    assert stream.getvalue().startswith(b"\x89PNG")
    assert len(picture(make_facts(scan=None)).axes) == 1
