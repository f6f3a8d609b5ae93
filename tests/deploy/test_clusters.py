"""The clusters of deploy/kuberay, deploy/launcher and deploy/skypilot: valid, and with what a run needs."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import validate_parameters
from jsonschema import Draft202012Validator
from ray.autoscaler._private.util import prepare_config, validate_config
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from reinforce.config import load_config
from tests.helpers.kubernetes_schema import FILE as KUBERNETES

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
FILES = {"RayCluster": ROOT / "deploy/kuberay/raycluster.yaml", "RayJob": ROOT / "deploy/kuberay/rayjob.yaml"}


def manifest(kind: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(FILES[kind].read_text())
    return loaded


@pytest.fixture(scope="module")
def validators() -> dict[str, Draft202012Validator]:
    kuberay = yaml.safe_load((HERE / "kuberay.schema.yaml").read_text())
    schemas = {"kuberay": kuberay, "kubernetes": json.loads(KUBERNETES.read_text())}
    pairs = [(name, Resource.from_contents(schema, DRAFT202012)) for name, schema in schemas.items()]
    registry: Registry[Any] = Registry().with_resources(pairs)
    return {kind: Draft202012Validator({"$ref": f"kuberay#/$defs/{kind}"}, registry=registry) for kind in FILES}


def errors(validator: Draft202012Validator, document: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("kind", FILES)
def test_the_manifests_follow_the_schemas_of_kuberay_and_kubernetes(
    kind: str, validators: dict[str, Draft202012Validator]
) -> None:
    assert errors(validators[kind], manifest(kind)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.entryPoint", "python"),
        ("spec.submissionMode", "HttpMode"),
        ("spec.rayClusterSpec.autoscalerOptions.idleTimeout", 3),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplica", 1),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.startUpProbe", {}),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.env.0.value", 1),
        ("spec.rayClusterSpec.workerGroupSpecs.1.template.spec.volumes.0.emptyDir.size", "16Gi"),
    ],
)
def test_a_misspelt_field_and_a_wrong_type_are_found(
    path: str, value: Any, validators: dict[str, Draft202012Validator]
) -> None:
    document = copy.deepcopy(manifest("RayJob"))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    target: Any = document
    for key in parents:
        target = target[key]
    target[last] = value
    assert errors(validators["RayJob"], document)


def test_both_manifests_start_the_same_cluster() -> None:
    assert manifest("RayJob")["spec"]["rayClusterSpec"] == manifest("RayCluster")["spec"]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    spec = manifest("RayCluster")["spec"]
    yield "head", spec["headGroupSpec"]["template"]["spec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


@pytest.mark.parametrize(("name", "pod"), pods())
def test_each_pod_has_probes_credentials_shared_memory_and_no_rights(name: str, pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    probes = {"startupProbe", "readinessProbe", "livenessProbe"}
    assert {container[probe]["httpGet"]["path"] for probe in probes} <= {
        "/api/gcs_healthz",
        "/api/local_raylet_healthz",
    }
    assert container["envFrom"] == [{"secretRef": {"name": "reinforce-object-store"}}]
    assert not [entry for entry in container["env"] if re.search("KEY|SECRET|TOKEN", entry["name"])]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert mounts["/etc/reinforce"]["configMap"]["name"] == "reinforce-config"
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["resources"]["requests"] == container["resources"]["limits"]


def test_workers_run_on_gpu_pods_on_demand_and_on_spot_nodes_and_not_on_the_head() -> None:
    spec = manifest("RayCluster")["spec"]
    assert spec["enableInTreeAutoscaling"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    workers = load_config(ROOT / "configs/dfn5b.yaml").workers
    for group in spec["workerGroupSpecs"]:
        [container] = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert int(limits["nvidia.com/gpu"]) == workers.gpus
        assert int(limits["cpu"]) >= (workers.cpus or 0)
        assert group["minReplicas"] < group["maxReplicas"]
    on_demand, spot = (group["template"]["spec"] for group in spec["workerGroupSpecs"])
    assert "cloud.google.com/gke-spot" in {**spot["nodeSelector"]}.keys() - on_demand["nodeSelector"].keys()
    environment = {entry["name"]: entry["value"] for entry in on_demand["containers"][0]["env"]}
    drain = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert 0 < on_demand["terminationGracePeriodSeconds"] - drain <= 60, "time to end after a drain"


def test_the_manifests_name_the_ray_of_the_image_and_files_that_are_in_it() -> None:
    job = manifest("RayJob")["spec"]
    [ray] = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert job["rayClusterSpec"]["rayVersion"] == ray
    [script] = re.findall(r"/opt/reinforce/(\S+\.py)", job["entrypoint"])
    assert (ROOT / script).is_file()
    for image in ("cpu", "cuda"):
        assert (
            f"COPY jobs /opt/reinforce/{Path(script).parent}"
            in (ROOT / f"deploy/docker/{image}.Dockerfile").read_text()
        )


def _without_unknown_fields(schema: Any) -> Any:
    """The schema of a CRD, with errors for fields that the API server would drop."""
    if isinstance(schema, list):
        return [_without_unknown_fields(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _without_unknown_fields(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


@pytest.mark.skipif("DEPLOY_CRDS" not in os.environ, reason="set DEPLOY_CRDS to a file with KubeRay's CRDs")
def test_the_manifests_follow_the_crds_of_a_cluster() -> None:
    documents = [*yaml.safe_load_all(Path(os.environ["DEPLOY_CRDS"]).read_text())]
    crds = [crd for document in documents for crd in document.get("items", [document])]
    kinds = {crd["spec"]["names"]["kind"]: crd["spec"]["versions"] for crd in crds}
    for kind in FILES:
        [schema] = [v["schema"]["openAPIV3Schema"] for v in kinds[kind] if v["name"] == "v1"]
        schema["properties"]["metadata"] = {"type": "object"}
        assert errors(Draft202012Validator(_without_unknown_fields(schema)), manifest(kind)) == []


def test_the_schema_of_kubernetes_is_that_of_the_package(deploy_tools: Path) -> None:
    code = "import tests.helpers.kubernetes_schema as k; print(k.text(), end='')"
    done = subprocess.run([deploy_tools / "python", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == KUBERNETES.read_text()


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
