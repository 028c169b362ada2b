"""Trainings that lose workers or nodes, on Ray's own cluster for tests: several nodes on this machine."""

import logging
from pathlib import Path
from typing import Any

import pytest

from distspec.config import Experiment, Needs, Train
from distspec.errors import ShardError
from distspec.pipeline import run
from distspec.results.layout import model_folder
from distspec.stages.train import attempts
from distspec.stages.train.stage import train
from distspec.stages.train.workers import TrainingJob
from distspec.store import SpectraStore
from tests.support.processes import told_by
from tests.support.small import small

MODEL = {"model": {"hidden": [32], "latents": 4}, "epochs": 4, "batch": 64}
RANGE = MODEL | {"workers": {"min": 1, "max": 4}}

SETTING = """
import json, os, sys, threading, time
os.environ |= {{"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}}
import logging
import ray
from pathlib import Path
from ray.cluster_utils import Cluster
from distspec.config import Experiment
from distspec.models.training.loop import newest_epochs
from distspec.results.layout import model_folder
from distspec.runtime.cluster import connect
from distspec.stages.train.stage import train
from distspec.store import SpectraStore

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 0}})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
tree = json.loads({experiment!r})
tree["runtime"]["address"] = cluster.address
experiment = Experiment.model_validate_json(json.dumps(tree))
connect(experiment.runtime)
logging.getLogger("ray.train").setLevel(logging.CRITICAL)
store = SpectraStore.open({store!r})
state = Path(experiment.output) / "training" / model_folder(experiment, store.digest).name / "first"

class Heard:
    def write(self, text):
        said.append(text)
        return sys.__stderr__.write(text)

    def flush(self):
        sys.__stderr__.flush()

said, sys.stderr = [], Heard()
made = []
training = threading.Thread(target=lambda: made.append(train(experiment, store)))
training.start()
while len(newest_epochs(state)) < 2 and training.is_alive():
    time.sleep(0.02)
cluster.remove_node(nodes[1], allow_graceful=False)
if {again}:
    # In the main thread: Ray wants to add nodes there.
    while training.is_alive() and "training waits" not in "".join(said):
        time.sleep(0.2)
    cluster.add_node(num_cpus=1)
training.join()
print(json.dumps({{"sha256": made[0].sha256, "nodes": sum(node["Alive"] for node in ray.nodes())}}))
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> SpectraStore:
    """Give the small experiment's spectra."""
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    return run(small(tmp_path_factory.mktemp("store")), "ingest").store


def disturbed(experiment: Experiment, store: str, *, again: bool = False) -> tuple[dict[str, Any], str]:
    """Train on two nodes, one of which is lost after two epochs, and joined again if asked for; give what is told, and
    stderr.
    """
    return told_by(SETTING.format(experiment=experiment.model_dump_json(), store=store, again=again))


@pytest.mark.slow
def test_a_range_of_workers_gives_the_same_bits_for_any_number_of_them(
    store: SpectraStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for workers in (1, 3):
        monkeypatch.setattr(attempts, "_room", lambda settings, each, workers=workers: workers)
        change = RANGE | {"density": {"kind": "sliced", "layers": 4}, "epochs": 2}
        found.append(train(small(tmp_path / str(workers), train=change), store))
    assert found[0].sha256 == found[1].sha256
    assert found[0].facts == found[1].facts


@pytest.mark.slow
def test_a_range_goes_on_after_a_node_is_lost_and_ends_with_the_same_weights(
    store: SpectraStore, tmp_path: Path
) -> None:
    change = RANGE | {"epochs": 8, "workers": {"min": 1, "max": 2}}
    undisturbed = train(small(tmp_path / "whole", train=change), store)
    told, _ = disturbed(small(tmp_path / "out", train=change), store.path)
    assert told["nodes"] == 2  # the head, and the one that is left
    assert told["sha256"] == undisturbed.sha256


@pytest.mark.slow
def test_a_fixed_number_says_what_it_waits_for_and_goes_on_once_a_node_joins(
    store: SpectraStore, tmp_path: Path
) -> None:
    change = MODEL | {"epochs": 8, "workers": 2}
    undisturbed = train(small(tmp_path / "whole", train=change), store)
    told, said = disturbed(small(tmp_path / "out", train=change), store.path, again=True)
    assert told["sha256"] == undisturbed.sha256
    assert "training waits for 2 workers, each of which takes 1 CPU and 0 GPUs; the cluster has 1 CPU" in said


@pytest.mark.slow
def test_an_epoch_that_never_ends_is_tried_again_and_then_given_up(
    store: SpectraStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "TRIES", 2)
    # No epoch ends in so short a time.
    experiment = small(tmp_path, train=MODEL | {"workers": 1}, runtime={"workers": 2, "item_seconds": 0.001})
    with pytest.raises(ShardError, match="2 attempts brought no epoch more, given up"):
        train(experiment, store)


def test_one_more_range_names_the_same_model_if_its_shares_are_the_same(tmp_path: Path) -> None:
    one, other, third = (
        model_folder(small(tmp_path, train=MODEL | {"workers": workers}), "store")
        for workers in ({"min": 1, "max": 4}, {"min": 3, "max": 4}, 4)
    )
    assert one == other != third


def test_room_is_counted_by_what_there_is_least_of() -> None:
    assert attempts._times(Needs(8.0, 2.0), Needs(1.0, 1.0)) == 2
    assert attempts._times(Needs(8.0, 0.0, 10.0), Needs(1.0, 0.0, 4.0)) == 2


def test_variables_are_not_shown() -> None:
    job = TrainingJob("store", "state", Train(), 1, variables=(("KEY", "secret"),))
    assert "secret" not in repr(job)
