"""The files of Ray's cluster launcher, by Ray's own checks, and the task of SkyPilot, by its own parser."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import validate_parameters
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]


def launcher(cloud: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / f"deploy/launcher/{cloud}.yaml").read_text())
    return loaded


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_accepts_the_cluster(cloud: str) -> None:
    config = prepare_config(launcher(cloud))
    validate_config(config)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}, "no workers on the head"
    assert {name: kind["max_workers"] for name, kind in types.items() if name != "head"} == {"gpu": 2, "gpu-spot": 64}
    assert config["max_workers"] == 66
    assert any("drain_on_notice" in command for command in config["worker_start_ray_commands"])


@pytest.mark.parametrize("change", [{"max_worker": 2}, {"head_node_type": "none"}, {"idle_timeout_minutes": "5"}])
def test_ray_refuses_a_mistake(change: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"max_worker|head_node_type|'5' is not"):
        validate_config(prepare_config({**launcher("aws"), **change}))


def test_ec2_accepts_the_nodes() -> None:
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in launcher("aws")["available_node_types"].values():
        validate_parameters({"MinCount": 1, "MaxCount": 1, **kind["node_config"]}, model)
    spot = launcher("aws")["available_node_types"]["gpu-spot"]["node_config"]
    assert spot["InstanceMarketOptions"] == {"MarketType": "spot"}


_PARSE = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
print(json.dumps({
    "version": sky.__version__, "nodes": task.num_nodes, "envs": task.envs, "secrets": sorted(task.secrets),
    "resources": [[r.use_spot, r.job_recovery, sorted(r.accelerators)] for r in task.resources],
}))
"""


def test_skypilot_parses_the_task_and_recovers_spot_nodes(deploy_tools: Path) -> None:
    command = [deploy_tools / "python", "-c", _PARSE, "deploy/skypilot/reinforce.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    task = json.loads(done.stdout.splitlines()[-1])
    assert task["resources"]
    for spot, recovery, accelerators in task["resources"]:
        assert spot
        assert recovery["strategy"] == "EAGER_NEXT_REGION"
        assert len(accelerators) == 1
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    assert task["secrets"] == ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
