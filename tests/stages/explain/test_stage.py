import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from distspec import explainers
from distspec.config import Experiment
from distspec.detectors.explainable import Explainable
from distspec.detectors.neural.scores import ModelScores
from distspec.errors import DistspecError, DistspecWarning, LayoutError, ShardError
from distspec.explainers.ascent import Path as Way
from distspec.explainers.ascent import ascend, growth
from distspec.explainers.lime import LimeExplainer
from distspec.models.checkpoint import Checkpoint
from distspec.pipeline import Products
from distspec.results.explanations import Explanations, RowExplanation
from distspec.results.layout import ascent_layer, explain_layer
from distspec.results.lines import LineResults
from distspec.results.scores import Scores
from distspec.runtime.workers import map_items
from distspec.stages.explain import stage as explain_stage
from distspec.stages.explain.stage import ascents_of, explain, explanations_of, ordinary_covariance
from distspec.store import Layer, SpectraStore
from tests.support.small import contents, small


def test_the_top_of_each_score_is_explained_best_first(done: tuple[Experiment, Products]) -> None:
    _, made = done
    assert set(made.explanations) == {"lime"}
    layer = made.explanations["lime"]
    assert layer.attributes["names"] == ["mse", "chi2"]
    rows, rank = layer.read("row"), layer.read("rank")
    lists = []
    for place, name in enumerate(("mse", "chi2")):
        values = made.scores.read(name)
        order = np.argsort(-values, kind="stable")[: int(np.ceil(0.05 * np.isfinite(values).sum()))]
        listed = rank[:, place] >= 0
        np.testing.assert_array_equal(rows[listed][np.argsort(rank[listed, place])], order)
        lists.append(order.tolist())
    # A spectrum that is in both lists is explained once, for both scores.
    assert rows.tolist() == list(dict.fromkeys(lists[0] + lists[1]))
    assert layer.read("weights").shape == (len(rows), 2, 40)
    assert len(layer.attributes["segment_of"]) == made.store.grid.pixels
    assert np.isfinite(layer.read("weights")).all()
    assert (layer.read("r2") <= 1).all()
    assert set(layer.read("reason").tolist()) == {""}


def test_workers_explain_as_one_process_does(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    layer = made.explanations["lime"]
    rows = layer.read("row")[:3]
    scores = Explainable(("mse", "chi2"), ModelScores(made.checkpoint, experiment.score))
    (method,) = experiment.explain.methods
    local = explainers.build(method, made.store.grid, experiment.seed, rest=True)
    found = local.explain(scores, made.store.take(rows))
    np.testing.assert_allclose(layer.read("weights")[:3], found.weights, rtol=1e-3, atol=1e-4)
    for name, values in found.more.items():
        np.testing.assert_allclose(layer.read(name)[:3], values, rtol=1e-3, atol=1e-3, err_msg=name)
    assert found.pixel_weights.shape == (3, 2, made.store.grid.pixels)


def test_only_unfinished_explanations_are_made_again(done: tuple[Experiment, Products]) -> None:
    experiment, made = done
    folder = Path(made.store.path) / "layers" / made.explanations["lime"].name
    before = contents(folder)
    stamp = (folder / "weights/c/0/0/0").stat().st_mtime_ns
    (folder / "commits/c/1").unlink()
    explain(experiment, SpectraStore.open(made.store.path, write=True), made.checkpoint, Scores([made.scores]))
    assert contents(folder) == before
    assert (folder / "weights/c/0/0/0").stat().st_mtime_ns == stamp


@pytest.fixture
def copied(done: tuple[Experiment, Products], tmp_path: Path) -> tuple[Experiment, Products, SpectraStore]:
    """The small survey in a place of its own, which may change."""
    shutil.copytree(done[1].store.path, tmp_path / "store.zarr")
    changes = {"ingest": {"store": str(tmp_path / "store.zarr")}, "runtime": {"workers": 1}}
    return small(tmp_path / "out", **changes), done[1], SpectraStore.open(tmp_path / "store.zarr", write=True)


def explained_with(copied: tuple[Experiment, Products, SpectraStore], **settings: Any) -> dict[str, Layer]:
    experiment, made, store = copied
    tree = json.loads(experiment.model_dump_json())
    tree["explain"] |= settings
    wanted = Experiment.model_validate_json(json.dumps(tree))
    scores = Scores([store.layer(made.scores.name)])
    found = explain(wanted, store, made.checkpoint, scores)
    assert {name: layer.name for name, layer in explanations_of(wanted, store, scores).items()} == {
        name: layer.name for name, layer in found.items()
    }
    return found


METHODS = [
    {"kind": "imo", "windows": [1, 16], "baselines": 2, "like": "class"},
    {"kind": "imo", "name": "near", "windows": [16], "baselines": 2, "like": "redshift"},
    {"kind": "gradient"},
    {"kind": "gradient_input"},
    {"kind": "integrated_gradients", "steps": 5},
    {"kind": "expected_gradients", "baselines": 2, "steps": 5},
    {"kind": "ablation"},
    {"kind": "occlusion", "stride": 8},
]


@pytest.mark.slow
def test_every_method_explains_every_score(copied: tuple[Experiment, Products, SpectraStore]) -> None:
    found = explained_with(copied, methods=METHODS, fraction=0.01)
    assert list(found) == ["imo", "near", *(one["kind"] for one in METHODS[2:])]
    rows = found["imo"].read("row")
    for name, layer in found.items():
        assert layer.read("row").tolist() == rows.tolist(), name
        weights = layer.read("weights")
        assert weights.shape == (len(rows), 2, 240)
        assert np.isfinite(weights).all()
        assert (np.abs(weights).max(axis=2) > 0).all()
        good = copied[2].take(rows).good
        assert (weights.transpose(0, 2, 1)[~good] == 0).all()
    assert found["imo"].read("windows").shape == (len(rows), 2, 2, 240)
    # What is shown of a row: by how much integrated gradients miss the change of the score, and what windows say.
    explained, layer = Explanations(copied[2], found, "mse"), found["integrated_gradients"]
    shown = {one.method: one for one in explained.all(int(rows[0]))}
    missing, total = layer.read("missing")[0, 0], layer.read("weights")[0, 0].sum(dtype=np.float64)
    assert shown["integrated_gradients"].missing == pytest.approx(abs(missing / (total - missing)), rel=1e-4)
    assert shown["gradient"].missing is None
    assert [(name, widths) for name, widths, _ in explained.windows(int(rows[0]))] == [("imo", [1, 16]), ("near", [16])]


def test_a_list_of_ids_is_explained_in_the_place_of_top_lists(
    copied: tuple[Experiment, Products, SpectraStore], tmp_path: Path
) -> None:
    _, made, store = copied
    usable = np.flatnonzero(store.column("status") == 0)[[50, 3, 20]]
    ids = store.column("id", usable).astype(str).tolist()
    (tmp_path / "ids.txt").write_text("\n".join([*ids, "", "12345"]))
    # Blanks around ids, and rows without one, are no ids.
    (tmp_path / "selection.csv").write_text("name,id\n" + "".join(f"x, {one} \n" for one in ids) + "x,\n")
    (tmp_path / "marked.txt").write_text("\n".join(ids), encoding="utf-8-sig")
    with pytest.warns(DistspecWarning, match=r"of 4 ids in .*ids.txt 1 not in the store"):
        layers = [explained_with(copied, ids=str(tmp_path / "ids.txt"))["lime"]]
    layers += [explained_with(copied, ids=str(tmp_path / name))["lime"] for name in ("selection.csv", "marked.txt")]
    values = made.scores.take("mse", usable)
    for layer in layers:
        assert layer.read("row").tolist() == usable[np.argsort(-values)].tolist()
        assert layer.read("rank")[:, 0].tolist() == [0, 1, 2]
        assert sorted(layer.read("rank")[:, 1]) == [0, 1, 2]
    assert layers[1].name == layers[2].name
    # Another content of the same file is another list.
    (tmp_path / "ids.txt").write_text(ids[0])
    assert explained_with(copied, ids=str(tmp_path / "ids.txt"))["lime"].rows == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "explain.ids: no file"),
        ("other.txt", "99\n", "none of the 1 ids .* such as '99', is that of a scored spectrum"),
        ("empty.txt", "\n", "none of the 0 ids"),
        ("list.doc", "1", "explain.ids: .* tells no format"),
        ("list.csv", "name\nx\n", "no column 'id'"),
        ("bytes.txt", b"\xff\xfe\x00", "is no text of ids"),
    ],
)
def test_a_list_that_names_nothing_is_refused(
    copied: tuple[Experiment, Products, SpectraStore], tmp_path: Path, name: str, content: Any, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DistspecError, match=message):
        explained_with(copied, ids=str(tmp_path / name))


@pytest.mark.slow
def test_a_spectrum_that_fails_takes_no_other_with_it(
    copied: tuple[Experiment, Products, SpectraStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made, store = copied
    usable = np.flatnonzero(store.column("status") == 0)[:5]
    poison = int(usable[1])

    class Failing(LimeExplainer):
        def _one(self, scores: Any, spectrum: Any) -> Any:
            if poison in spectrum.rows:
                raise RuntimeError("no such\nnumber")
            return super()._one(scores, spectrum)

    (method,) = copied[0].explain.methods
    explainer = Failing(method, store.grid, 0)
    # In this process, where that is what is built.
    monkeypatch.setattr("distspec.explainers.build", lambda *_, **__: explainer)
    monkeypatch.setattr(explain_stage, "map_items", partial(map_items, here=True))
    path = Path(store.path).parent / "ids.txt"
    path.write_text("\n".join(store.column("id", usable).astype(str)))
    layer = explained_with(copied, ids=str(path))["lime"]
    reasons = dict(zip(layer.read("row").tolist(), layer.read("reason").tolist(), strict=True))
    assert reasons == {int(row): "RuntimeError: no such number" if row == poison else "" for row in usable}
    lost = np.isnan(layer.read("weights")).all(axis=(1, 2))
    assert lost.tolist() == [row == poison for row in layer.read("row")]
    with pytest.raises(ShardError, match="RuntimeError: nothing works"):
        monkeypatch.setattr(Failing, "_one", lambda *_: (_ for _ in ()).throw(RuntimeError("nothing works")))
        explained_with(copied, ids=str(path), fraction=0.5)
    # It is left out of what is shown.
    explained = Explanations(store, {"lime": layer}, "mse")
    assert explained.find(poison) is None
    assert explained.find(int(usable[0])) is not None


def test_a_region_counts_by_its_weight_and_not_by_its_width(done: tuple[Experiment, Products]) -> None:
    _, made = done
    grid, row = made.store.grid, int(made.lines.read("row")[0])
    edges, weights = grid.edges[[0, 30, 40, 100, 200, 240]], np.array([0, 1, 0, 1, 0], np.float32)
    good = np.ones(grid.pixels, bool)
    told = LineResults(made.store, made.lines).one(row, RowExplanation("lime", "mse", edges, weights), good, 0.1)
    assert (told.regions[0].low, told.regions[0].high) == pytest.approx((edges[1], edges[2]))
    assert told.regions[0].share == pytest.approx(0.5)


@pytest.mark.slow
def test_a_damaged_layer_is_named(copied: tuple[Experiment, Products, SpectraStore]) -> None:
    layer = explained_with(copied, methods=[{"kind": "gradient"}], fraction=0.01)["gradient"]
    (Path(copied[2].path) / "layers" / layer.name / "zarr.json").write_text("{")
    with pytest.raises(LayoutError, match=rf"{layer.name} are missing or damaged .* remove it and run its stage again"):
        explained_with(copied, methods=[{"kind": "gradient"}], fraction=0.01)


def test_a_gradient_of_a_classical_score_is_refused_beforehand() -> None:
    with pytest.raises(ValidationError, match="'gradient', but score 'pca' is that of a classical detector"):
        small(
            Path("out"),
            detect={"detectors": [{"kind": "pca"}]},
            explain={"scores": ["pca"], "methods": [{"kind": "gradient"}]},
        )
    with pytest.raises(ValidationError, match="two methods are named 'lime'"):
        small(Path("out"), explain={"methods": [{"kind": "lime"}, {"kind": "lime"}]})


# --- the way to higher probability -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def direct(whole: tuple[Experiment, Products]) -> tuple[Experiment, Products, Way]:
    """The ways of the first unit of work, made without the stage.

    A whole one: rounding depends on the batch, and a way that follows a crease repeats every difference.
    """
    experiment, made = whole
    checkpoint = Checkpoint.load(made.checkpoint.folder)
    rows = made.ascents.read("row")[: made.ascents.shard_rows]
    latents = torch.from_numpy(made.scores.take("latents", rows)).double()
    covariance = torch.from_numpy(ordinary_covariance(made.scores))
    settings = experiment.explain.ascent
    return (
        experiment,
        made,
        ascend(
            checkpoint.density.log_prob, latents, steps=settings.steps, length=settings.length, covariance=covariance
        ),
    )


def test_the_top_of_the_density_is_followed_first_then_that_of_the_other_scores(
    whole: tuple[Experiment, Products],
) -> None:
    _, made = whole
    layer = made.explanations["lime"]
    rank, rows = layer.read("rank"), layer.read("row")
    tops = [rows[rank[:, k] >= 0][np.argsort(rank[rank[:, k] >= 0, k])].tolist() for k in range(2)]
    expected = list(dict.fromkeys(tops[0] + tops[1]))
    assert made.ascents.read("row").tolist() == expected
    assert len(expected) > made.ascents.shard_rows  # two shards, so that actors are at work
    score = -made.ascents.read("log_prob")[:, 0]
    np.testing.assert_allclose(score, made.scores.take("density", np.array(expected)), rtol=1e-5, atol=1e-4)


def test_ways_are_those_of_a_direct_ascent(direct: tuple[Experiment, Products, Way]) -> None:
    experiment, made, path = direct
    layer = made.ascents
    part = slice(0, layer.shard_rows)
    np.testing.assert_allclose(layer.read("log_prob")[part], path.log_prob, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(layer.read("latents")[part], path.latents, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(layer.read("arc")[part], path.arc, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(layer.read("taken")[part], path.taken)
    assert (layer.read("log_prob")[:, -1] > layer.read("log_prob")[:, 0]).any()
    decode = made.checkpoint.model.decode
    grown = growth(path, lambda z: decode(z.float()))
    np.testing.assert_allclose(layer.read("growth")[part], grown, rtol=1e-3, atol=1e-3)
    spectra = layer.read("spectra")
    assert spectra.shape[1] == experiment.explain.ascent.points
    np.testing.assert_allclose(spectra[:, -1] - spectra[:, 0], layer.read("growth"), atol=1e-5)
    half = path.evenly(3)[:, 1]
    with torch.no_grad():
        np.testing.assert_allclose(spectra[part, 1], decode(half.float()), rtol=1e-3, atol=1e-3)
    # The way starts at what the model makes of the spectrum.
    rows = layer.read("row")[part]
    reconstruction = ModelScores(made.checkpoint, experiment.score).reconstruct(made.store.take(rows))
    np.testing.assert_allclose(spectra[part, 0], reconstruction, rtol=1e-4, atol=1e-4)


def test_the_classes_at_both_ends_are_the_most_probable(direct: tuple[Experiment, Products, Way]) -> None:
    _, made, path = direct
    layer = made.ascents
    posterior = made.scores.take("posterior", layer.read("row"))
    np.testing.assert_array_equal(layer.read("class")[:, 0], posterior.argmax(axis=1))
    np.testing.assert_allclose(layer.read("class_probability")[:, 0], posterior.max(axis=1), rtol=1e-4)
    end = made.checkpoint.density.posterior(path.latents[:, -1])
    np.testing.assert_allclose(layer.read("class_probability")[: len(end), 1], end.max(dim=1).values, atol=1e-3)
    assert layer.attributes["classes"] == list(made.checkpoint.density.names)


@pytest.mark.slow
def test_only_unfinished_ways_are_made_again(whole: tuple[Experiment, Products]) -> None:
    experiment, made = whole
    folder = Path(made.store.path) / "layers" / made.ascents.name
    before = contents(folder)
    stamp = (folder / "arc/c/0/0").stat().st_mtime_ns
    (folder / "commits/c/1").unlink()
    layer = explain_stage.ascend(
        experiment, SpectraStore.open(made.store.path, write=True), made.checkpoint, made.scores
    )
    assert layer.pending() == []
    assert contents(folder) == before
    assert (folder / "arc/c/0/0").stat().st_mtime_ns == stamp


def test_without_a_density_or_when_told_so_nothing_is_followed(
    done: tuple[Experiment, Products], whole: tuple[Experiment, Products]
) -> None:
    experiment, made = done
    assert made.ascents is None
    assert ascents_of(experiment, made.store, made.scores) is None
    assert not [name for name in made.store.layers() if name.startswith("ascent")]
    experiment, made = whole
    off = small(Path(experiment.output), explain={"ascent": False})
    assert off.explain.ascent is None
    assert explain_stage.ascend(off, made.store, made.checkpoint, made.scores) is None
    assert ascents_of(off, made.store, made.scores) is None


def test_names_change_with_what_they_depend_on_alone(whole: tuple[Experiment, Products]) -> None:
    experiment, made = whole

    def named(**changes: object) -> tuple[str, str]:
        explain_settings = experiment.explain.model_copy(update=changes)
        changed = experiment.model_copy(update={"explain": explain_settings})
        return ascent_layer(changed, made.scores), explain_layer(changed, changed.explain.methods[0], [made.scores])

    way, weights = named()
    other = (experiment.explain.methods[0].model_copy(update={"samples": 7}),)
    assert named(methods=other)[0] == way
    assert named(methods=other)[1] != weights
    # A method's layer does not change with the methods beside it.
    assert named(methods=experiment.explain.methods[:1])[1] == weights
    longer = experiment.explain.ascent.model_copy(update={"steps": 21})
    assert named(ascent=longer)[0] != way
    assert named(ascent=longer)[1] == weights
    assert named(scores=("density",))[0] != way


def test_ordinary_latents_are_those_of_the_sample_without_its_outliers(whole: tuple[Experiment, Products]) -> None:
    _, made = whole
    latents, score = made.scores.read("latents").astype(float), made.scores.read("density")
    known = ~np.isnan(score)
    kept = known & (score <= np.quantile(score[known], 0.99))
    np.testing.assert_allclose(ordinary_covariance(made.scores), np.cov(latents[kept].T), rtol=1e-6)
