"""Trainings on a cluster of several nodes, one of which is lost for good."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.commands import json_of_process

#: Ray asks a node after 1 s and each 0.5 s whether it lives, instead of after 5 s and each 3 s: a killed node does not
#: answer, and is dead after five questions. One that is only slow still has 10 s for each answer.
OFTEN = {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500"}

#: Trainings whose ranks have no place, hang, or lose their node, and that are sent SIGTERM; one that loses a node of
#: two; and one that loses its node before its rank has started. A rank takes five seconds of CPU to start, so there is
#: one where two would show nothing more.
SCRIPT = """
import json, os, signal, sys, threading, time
from functools import partial
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from reinforce.errors import HostLost
from reinforce.training import ray_train
from reinforce.training.launch import launch
from reinforce.processes.signals import Stopped
from tests.helpers.trainings import job, slow

folder, ended = Path(sys.argv[1]), {}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
ray.init(address=cluster.address, log_to_driver=False)

def lose_a_node(output):
    while not list(output.glob("checkpoints/*.safetensors")):
        time.sleep(0.1)
    cluster.remove_node(nodes.pop(), allow_graceful=False)

def stop(output):
    while getattr(signal.getsignal(signal.SIGTERM), "__module__", "") != "reinforce.processes.signals":
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)

def hang(output):
    while not (output / "log.jsonl").exists():
        time.sleep(0.1)
    stop(output)

def lose_a_node_early(output):
    while not any(actor["ActorClassName"] == "Mailbox" for actor in alive()):
        time.sleep(0.05)
    cluster.remove_node(nodes.pop(), allow_graceful=False)

def alive():
    return [actor for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]

def lose_a_node_and_stop(output):
    lose_a_node(output)
    stop(output)

def train(name, during, ranks=1, seconds=0.1):
    while sum(node["Alive"] for node in ray.nodes()) > 1 + len(nodes):  # what was lost before
        time.sleep(0.1)
    output, compute = folder / name, {"ranks": ranks, "gpus": 0, "cpus": 1}
    made = job(output, steps=10_000, batch=24, compute=compute, checkpoints={"every": 5, "keep": 2})
    meanwhile = threading.Thread(target=during, args=[output])
    meanwhile.start()
    try:
        ended[name] = launch(partial(slow, seconds=seconds), made, cluster.address).steps
    except (HostLost, Stopped) as error:
        ended[name] = f"{type(error).__name__}: {error}"
    meanwhile.join()

ray_train._RETURN_SECONDS = 3.0
ray_train._TERMINATION_SECONDS = 5.0
train("waiting", stop, ranks=3)
train("lost", lose_a_node, ranks=2)
train("hung", hang, seconds=1_000)
train("stopped", lose_a_node_and_stop)
nodes.append(cluster.add_node(num_cpus=1))
train("early", lose_a_node_early)
deadline = time.monotonic() + 30  # Ray removes groups in the background
while True:
    groups = ray.util.placement_group_table().values()
    ended["groups"] = [group["state"] for group in groups if group["state"] != "REMOVED"]
    if not ended["groups"] or time.monotonic() > deadline:
        break
    time.sleep(0.2)
ended["actors"] = [actor["ActorClassName"] for actor in alive()]
ray.shutdown()
cluster.shutdown()
print(json.dumps(ended))  # the last line: until here, Ray may print that a node is dead
"""


def test_a_training_that_loses_a_host_for_good_ends_with_its_name_and_a_signal_always_ends_it(tmp_path: Path) -> None:
    ended = json_of_process(SCRIPT, tmp_path, **OFTEN)
    assert ended["waiting"] == "Stopped: 15", "its ranks have never started"
    assert ended["hung"] == "Stopped: 15", "they do not finish their step"
    assert ended["stopped"] == "Stopped: 15", "its ranks cannot stop by themselves"
    lost = r"HostLost: host \S+ \(\S+%s\) was lost, and the other hosts can hold %s ranks with 1 CPU each\. "
    assert re.match(lost % (", rank [01]", "1 of 2"), ended["lost"]), ended
    assert re.match(lost % ("", "0 of 1"), ended["early"]), ended
    assert ended["groups"] == [], "they would keep resources of the cluster"
    assert set(ended["actors"]) <= {"_AutoscalingCoordinatorActor"}, "nothing that would start the ranks later"
