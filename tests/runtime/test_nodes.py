"""Nodes that are lost, and nodes that join, on Ray's own cluster for tests: several of them on this machine.

Each in a process of its own, since a process has one Ray.
"""

import subprocess
import sys
import time
from typing import Any

import pytest
import ray

from tests.support.processes import PATIENCE, told_by

SETTING = """
import json, os, sys, threading, time
os.environ |= {{"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}}
import ray
from ray.cluster_utils import Cluster
from distspec.config import Runtime
from distspec.runtime.cluster import connect
from distspec.runtime.workers import map_items
from tests.runtime.test_nodes import Slow

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 0}})
nodes = [cluster.add_node(num_cpus=1, resources={{name: 1}}) for name in {nodes}]
settings = Runtime(address=cluster.address)
connect(settings)
begin, results = time.time(), []
work = threading.Thread(target=lambda: [results.append(result) for result in map_items(
    Slow, (), list(range({items})), settings, "work"
)])
work.start()
while not ({when}) and work.is_alive():
    time.sleep(0.1)
{act}
work.join()
print(json.dumps({{"seconds": time.time() - begin, "results": results}}))
sys.stdout.flush()
os._exit(0)
"""


class Slow:
    """Takes its time, and tells which node it is on."""

    def __call__(self, item: int) -> tuple[int, str]:
        time.sleep(1.0)
        return item, ray.get_runtime_context().get_node_id()


def outcome(nodes: list[str], items: int, when: str, act: str) -> tuple[dict[str, Any], str]:
    """Work through items on a cluster to which something happens; give seconds and results, and stderr."""
    return told_by(SETTING.format(nodes=nodes, items=items, when=when, act=act))


@pytest.mark.slow
def test_items_of_a_node_that_is_lost_go_to_another() -> None:
    # Without grace: its raylet is killed, and its workers with it.
    told, _ = outcome(["a", "b"], 10, "len(results) > 1", "cluster.remove_node(nodes[1], allow_graceful=False)")
    assert sorted(item for item, _ in told["results"]) == list(range(10))
    # Not counted towards the tries of an item, and no waiting for what will never come.
    assert told["seconds"] < 120


@pytest.mark.slow
def test_a_node_that_joins_late_takes_part() -> None:
    told, _ = outcome(["a"], 24, "len(results) > 1", "cluster.add_node(num_cpus=1)")
    assert sorted(item for item, _ in told["results"]) == list(range(24))
    assert len({node for _, node in told["results"]}) == 2


@pytest.mark.slow
def test_without_a_worker_it_says_what_it_waits_for_and_goes_on_once_there_is_one() -> None:
    told, said = outcome([], 2, "time.time() - begin > 15", "cluster.add_node(num_cpus=1)")
    assert sorted(item for item, _ in told["results"]) == [0, 1]
    assert "work waits for a worker, which takes 1 CPU and 0 GPUs; the cluster has 0 CPUs and 0 GPUs" in said


@pytest.mark.slow
def test_workers_are_as_many_as_gpus_allow_where_they_are_used() -> None:
    program = (
        "import ray\n"
        "from distspec.config import Needs, Runtime\n"
        "from distspec.runtime.cluster import workers_of\n"
        "ray.init(address='local', num_cpus=64, num_gpus=8, include_dashboard=False)\n"
        "print([workers_of(Runtime(), 1000, Needs(gpus=gpus)) for gpus in (1.0, 0.5, 2.0, 0.0)])\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert said.stdout.splitlines()[-1] == "[8, 16, 4, 64]"
