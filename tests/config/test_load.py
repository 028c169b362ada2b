from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from distspec.addresses import address_of
from distspec.config import Experiment, Needs, Runtime, digest, dump, load, presets
from distspec.detectors.neural.reconstruction import SCORES
from distspec.errors import ConfigError
from distspec.files import write_file


def test_a_file_states_only_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('preset = "demo"\n[train]\nepochs = 3\n')
    settings = load(str(file), ["train.batch=64"])
    assert (settings.name, settings.train.epochs, settings.train.batch) == ("demo", 3, 64)
    assert settings.train.patience == Experiment().train.patience


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_load_and_survive_dump_and_load(name: str, tmp_path: Path) -> None:
    settings = load(name)
    file = tmp_path / "again.toml"
    file.write_text(dump(settings), "utf-8")
    assert load(str(file)) == settings


@hypothesis.settings(deadline=None)
@hypothesis.given(
    epochs=st.integers(1, 10**6),
    rate=st.floats(1e-12, 1e3),
    hidden=st.lists(st.integers(1, 5000), max_size=5),
    output=st.text(st.characters(exclude_categories=("C",)), min_size=1),
)
def test_dump_and_load_are_inverse(
    epochs: int, rate: float, hidden: list[int], output: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = Experiment.model_validate(
        {"output": output, "train": {"epochs": epochs, "learning_rate": rate, "model": {"hidden": tuple(hidden)}}}
    )
    file = tmp_path_factory.mktemp("toml") / "x.toml"
    file.write_text(dump(settings), "utf-8")
    assert load(str(file)) == settings


def test_another_kind_replaces_the_whole_table() -> None:
    settings = load("demo", ["ingest.source.kind=sdss", "ingest.source.path=spectra"])
    assert settings.ingest.source.kind == "sdss"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.epoch=3", "unknown setting 'train.epoch'; did you mean 'epochs'?"),
        ("train.epochs=0", "setting 'train.epochs': Input should be greater than or equal to 1, got 0"),
        ("train.epochs=2.5", "setting 'train.epochs'"),
        ("train.gpu=1", "setting 'train.gpu': Input should be a valid boolean, got 1"),
        ("score.epsilon=nan", "setting 'score.epsilon'"),
        ("ingest.source.kind=sloan", "'simulate', 'sdss', 'desi', 'lamost', 'table', 'specutils'"),
        ("ingest.source={kind='sdss', path='x', pth='y'}", "unknown setting 'ingest.source.pth'; did you mean 'path'?"),
        ("ingest.source.path=x", "setting 'ingest.source.kind' is missing"),
        ("ingest.source={kind='sdss', path='x'}", "say how to correct Galactic extinction"),
        ("ingest.chunk_rows=100", "chunk_rows must divide shard_rows"),
        ("explain.scores=['mse', 'mad']", "explain.scores names 'mad', which is no score here; there are chi2, mse"),
        ("compare.scores=['rank_mean']", "compare.scores names 'rank_mean', which is no score"),
        ("detect.detectors=[{kind='pca'}, {kind='pca'}]", "two detectors are named 'pca'"),
        ("detect.detectors=[{kind='forest', name='mse'}]", "a detector cannot be named 'mse'"),
        ("detect.detectors=[{kind='fisher'}, {kind='pca', name='fisher_mixture'}]", "two detectors are named"),
        ("detect.detectors=[{kind='pca', name='region'}]", "a detector cannot be named 'region', which tells what led"),
        ("detect.detectors=[{kind='lof'}]", "expected one of 'pca', 'forest', 'isolation', 'fisher'"),
        ("evaluate.levels=[2.0]", "setting 'evaluate.levels.0'"),
        ("evaluate.kinds=['supernova']", "setting 'evaluate.kinds.0': Input should be 'e+a', 'double-peaked', "),
        ("evaluate.kinds=['blend', 'x']", "'redshift-error' or 'calibration-step', got 'x'"),
        ("runtime.workers=-1", "setting 'runtime.workers': Input should be greater than or equal to 0, got -1"),
        ("runtime.workers={min=4, max=3}", "setting 'runtime.workers': min = 4 is more than max = 3"),
        ("runtime.workers={mx=3}", "setting 'runtime.workers.max': Field required"),
        ("runtime.gpus_per_worker={ingest=1}", "'runtime.gpus_per_worker.ingest': Input should be 'score', 'explain'"),
        (
            "output=ftp://host/run",
            "setting 'output': ftp://host/run is no place for results; expected a folder, or a bucket such as s3://",
        ),
        ("name='../evil'", "setting 'name'"),
        ("preset=nothing", "no preset 'nothing'"),
        ("epochs", "is not an assignment"),
        ("=3", "is not an assignment"),
        ("a b=3", "is not valid TOML"),
    ],
)
def test_what_is_refused_is_named_in_one_line(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_worker_takes_is_set_for_all_stages_or_by_stage() -> None:
    runtime = load(None, ["runtime.gpus_per_worker=0.5", "runtime.memory_gb_per_worker={detect=6}"]).runtime
    assert runtime.needs("score") == Needs(1.0, 0.5, 0.0)
    assert runtime.needs("score").device == "cuda"
    # Where no network computes, no GPU is taken.
    assert runtime.needs("detect") == Needs(1.0, 0.0, 6.0)
    assert runtime.needs("ingest") == Needs()
    assert load(None, ["runtime.gpus_per_worker={explain=1}"]).runtime.needs("score") == Needs()


def test_workers_are_a_number_or_a_range() -> None:
    runtime = load(None, ["runtime.workers={max=8}"]).runtime
    assert (runtime.fewest, runtime.most) == (1, 8)
    runtime = load(None, ["runtime.workers=3"]).runtime
    assert (runtime.fewest, runtime.most) == (3, 3)
    assert (Runtime().fewest, Runtime().most) == (1, 0)


def test_a_bare_word_or_path_is_a_string() -> None:
    assert load(None, ["output=/data/my run"]).output == "/data/my run"


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a TOML file or a preset: .*demo"):
        load(str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load(str(broken))


@pytest.mark.parametrize("value", ["false", "30.0"])
def test_a_limit_is_unset_by_false_and_stays_unset(value: str, tmp_path: Path) -> None:
    settings = load("pae", [f"ingest.prepare.max_pixel_snr={value}", "ingest.prepare.cuts.z_min=false"])
    assert settings.ingest.prepare.max_pixel_snr == (None if value == "false" else 30)
    assert settings.ingest.prepare.cuts.z_min is None
    file = tmp_path / "again.toml"
    file.write_text(dump(settings), "utf-8")
    assert load(str(file)) == settings
    with pytest.raises(ConfigError, match="max_pixel_snr"):
        load(None, ["ingest.prepare.max_pixel_snr=true"])


def test_digest_is_stable_and_tells_settings_apart() -> None:
    # Written down once: another value would orphan every result on disk.
    assert digest({"a": 1, "b": [1.5, "x"]}) == digest({"b": [1.5, "x"], "a": 1}) == "7f79f3394218"
    assert digest(load(None)) != digest(load(None, ["seed=1"]))


def test_score_names_are_those_of_the_detector() -> None:
    assert len(SCORES) == 9
    assert load(None, [f"report.score={SCORES[-1]}"]).report.score == "chi2"


def test_settings_may_lie_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    place = address_of(f"{bucket}/{tmp_path.name}/tuned.toml")
    with pytest.raises(ConfigError, match="no settings file 's3://"):
        load(str(place), [])
    write_file(place, "seed = 7\n")
    assert load(str(place), []).seed == 7
