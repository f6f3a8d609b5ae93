"""The files of deploy/: images, scripts, units, clusters, its README, and the folder that a job uploads."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import validate_parameters
from jsonschema import Draft202012Validator
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from reinforce.config import load_config
from tests.deploy.kubernetes_schema import FILE as KUBERNETES
from tests.helpers.commands import output_of
from tests.helpers.pages import ROOT

DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
IMAGES = ("cpu", "cuda")
BENCHMARK = "benchmark"  # the image of cuda.Dockerfile with a benchmark


@pytest.fixture(scope="session")
def deploy_tools() -> Path:
    """The folder of the commands that `make deploy-check` installs."""
    folder = os.environ.get("DEPLOY_TOOLS")
    if folder is None:
        pytest.skip("`make deploy-check` runs this: it installs SkyPilot and Kubernetes' schemas, 500 MB")
    return Path(folder).absolute()


def loaded(file: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((DEPLOY / file).read_text())
    return values


def manifest(kind: str) -> dict[str, Any]:
    return loaded(f"kuberay/{kind.lower()}.yaml")


def launcher(cloud: str) -> dict[str, Any]:
    return loaded(f"launcher/{cloud}.yaml")


def tool(name: str) -> str:
    """The path of a linter, which a package of the extra `test` brings. Skips without it."""
    return shutil.which(name, path=f"{BIN}:{os.environ['PATH']}") or pytest.skip(f"{name} is not installed")


def scripts() -> dict[str, str]:
    """Shell code by name: the Slurm script, and commands in YAML."""
    sky = loaded("skypilot/reinforce.yaml")
    found = {"slurm": (DEPLOY / "slurm/reinforce.sbatch").read_text()}
    found |= {f"skypilot {key}": f"#!/bin/bash\n{sky[key]}" for key in ("setup", "run")}
    for cloud in ("aws", "gcp"):
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            lines = "\n".join(launcher(cloud)[key])
            found[f"{cloud} {key}"] = f"#!/bin/bash\nexport RAY_HEAD_IP=1.2.3.4\n{lines}\n"  # the launcher sets it
    return found


@pytest.mark.parametrize(("name", "code"), scripts().items())
def test_shell_code_passes_shellcheck(name: str, code: str) -> None:
    # SC1090: a virtual environment; SC2046: words of `jobs -p`; SC2086, SC2088: the words and `~` are for Ray
    output_of(tool("shellcheck"), "--norc", "--exclude=SC1090,SC2046,SC2086,SC2088", "-", given=code)


@pytest.mark.parametrize("image", [*IMAGES, BENCHMARK])
def test_dockerfiles_pass_hadolint(image: str) -> None:
    output_of(tool("hadolint"), DEPLOY / f"docker/{image}.Dockerfile")


@pytest.mark.parametrize("image", IMAGES)
def test_images_are_pinned_run_without_root_and_copy_what_the_context_has(image: str) -> None:
    text = (DEPLOY / f"docker/{image}.Dockerfile").read_text()
    build, final = text.split("\nFROM ${BASE}\n")
    assert "--constraint constraints.txt" in build
    assert re.search(r"^USER 1000$", final, re.MULTILINE)
    torch, vision = re.findall(r"ARG (?:TORCH|TORCHVISION)=(\S+)", build)
    tested = (ROOT / "constraints.txt").read_text()
    assert f"tested: {'.'.join(torch.split('.')[:2])} and {'.'.join(vision.split('.')[:2])}" in tested
    assert {*copied(image), *copied(BENCHMARK)} == allowed()
    assert all((ROOT / name).exists() for name in allowed())


def copied(image: str) -> dict[str, str]:
    """What an image copies of the context, with its place in the image."""
    lines = (DEPLOY / f"docker/{image}.Dockerfile").read_text().splitlines()
    words = [line.split()[1:] for line in lines if line.startswith("COPY") and "--from" not in line]
    return {name: target for *names, target in words for name in names}


def allowed() -> set[str]:
    return {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}


def test_the_benchmark_starts_from_what_its_image_has(tmp_path: Path) -> None:
    for name, target in {**copied("cuda"), **copied(BENCHMARK)}.items():
        installed = not target.startswith("/")  # of the stage that builds: packages
        place = tmp_path / ("packages" if installed else "") / (name if installed else target.lstrip("/"))
        if not target.endswith("/"):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(ROOT / name)
    text = (DEPLOY / f"docker/{BENCHMARK}.Dockerfile").read_text()
    [folder] = re.findall(r"^WORKDIR (.*)$", text, re.MULTILINE)
    [compiler] = re.findall(r"^RUN python (.*)$", text, re.MULTILINE)
    [entry] = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    python, *words = json.loads(entry)
    assert python == "python"
    for command in (compiler.split(), [*words, "--help"]):
        place = tmp_path / folder.lstrip("/")
        output_of(sys.executable, *command, cwd=place, PYTHONPATH=str(tmp_path / "packages"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", ["ray-head", "ray-node"])
def test_units_are_valid_for_systemd(unit: str, tmp_path: Path) -> None:
    text = (DEPLOY / f"systemd/{unit}.service").read_text()
    (tmp_path / f"{unit}.service").write_text(text.replace("/opt/venv/bin/ray ", f"{shutil.which('true')} "))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / f"{unit}.service")]
    assert subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout == b""


def test_the_command_lines_of_ray_start_are_those_of_the_installed_ray() -> None:
    from ray.scripts.scripts import cli

    texts = [path.read_text() for path in DEPLOY.rglob("*") if path.suffix in {".yaml", ".sbatch", ".service", ".py"}]
    options = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in cli.commands.items()
    }
    calls = [match for text in texts for match in re.finditer(r"\bray (start|health-check)\b([^\n;&|]*)", text)]
    assert len(calls) > 8
    for match in calls:
        assert set(re.findall(r"--[a-z-]+", match[2])) <= options[match[1]], match[0]
    drained = (DEPLOY / "drain_on_notice.py").read_text()
    assert set(re.findall(r"(--[a-z-]+)[=\"]", drained)) <= options["drain-node"]


REASON = "set DEPLOY_BUILD to the command that builds an image, such as DEPLOY_BUILD='docker build' (minutes)"


@pytest.mark.skipif("DEPLOY_BUILD" not in os.environ, reason=REASON)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("image", [*IMAGES, BENCHMARK])
def test_images_build(image: str) -> None:
    command = [*shlex.split(os.environ["DEPLOY_BUILD"]), "-f", f"deploy/docker/{image}.Dockerfile"]
    subprocess.run([*command, "-t", f"reinforce:{image}", "."], cwd=ROOT, check=True)


LARGE = [
    ".venv/lib/python3/site-packages/torch/lib.so", ".git/objects/pack/a.pack", "demo/shards/000.tar", "data/000.tar",
    "checkpoints/step-1.pt", "wandb/run/log.txt", "outputs/samples/a.parquet", "mine/000.tar.gz", "mine/a.parquet",
]  # fmt: skip


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip(f"not a checkout of git: {listed.stderr.strip()}")
    return listed.stdout.splitlines()


def test_a_job_uploads_code_and_configs_and_nothing_large(tracked: list[str], tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in [*tracked, *LARGE, "mine/teachers.py", "mine/run.yaml"]:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    for name in (".gitignore", ".rayignore"):
        (checkout / name).write_text((ROOT / name).read_text())
    excludes = get_runtime_env_default_excludes()
    create_package(str(checkout), tmp_path / "a.zip", include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(tmp_path / "a.zip") as package:
        uploaded = {name for name in package.namelist() if not name.endswith("/")}
    assert not uploaded & set(LARGE)
    folders = ("reinforce", "teachers", "schemas", "jobs", "configs")
    code = {name for name in tracked if name.split("/")[0] in folders}
    assert code | {"mine/teachers.py", "mine/run.yaml"} <= uploaded
    assert {name.split("/")[0] for name in uploaded if "/" in name} == {*folders, "mine"}
    size = sum((ROOT / name).stat().st_size for name in uploaded & set(tracked))
    assert size < 22e6, "of which the models of the demo are 16 MB"


def test_each_link_has_a_file_and_each_file_is_linked() -> None:
    text = (DEPLOY / "README.md").read_text()
    links = {(DEPLOY / link.split("#")[0]).resolve() for link in re.findall(r"\]\(([^)]+)\)", text)}
    assert [link for link in links if not link.exists()] == []
    files = {path for path in DEPLOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in files if path not in links and path.parent not in links} == {DEPLOY / "README.md"}


KINDS = ("RayCluster", "RayJob")


@pytest.fixture(scope="module")
def validators() -> dict[str, Draft202012Validator]:
    kuberay = yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text())
    schemas = {"kuberay": kuberay, "kubernetes": json.loads(KUBERNETES.read_text())}
    pairs = [(name, Resource.from_contents(schema, DRAFT202012)) for name, schema in schemas.items()]
    registry: Registry[Any] = Registry().with_resources(pairs)
    return {kind: Draft202012Validator({"$ref": f"kuberay#/$defs/{kind}"}, registry=registry) for kind in KINDS}


def errors(validator: Draft202012Validator, document: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifests_follow_the_schemas_of_kuberay_and_kubernetes(
    kind: str, validators: dict[str, Draft202012Validator]
) -> None:
    assert errors(validators[kind], manifest(kind)) == []


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    spec = manifest("RayCluster")["spec"]
    yield "head", spec["headGroupSpec"]["template"]["spec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


@pytest.mark.parametrize(("name", "pod"), pods())
def test_each_pod_has_probes_credentials_shared_memory_and_no_rights(name: str, pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    paths = {container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")}
    assert paths <= {"/api/gcs_healthz", "/api/local_raylet_healthz"}
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


def test_the_manifests_start_the_same_cluster_and_name_the_ray_of_the_image_and_files_that_are_in_it() -> None:
    job = manifest("RayJob")["spec"]
    assert job["rayClusterSpec"] == manifest("RayCluster")["spec"]
    [ray] = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert job["rayClusterSpec"]["rayVersion"] == ray
    [script] = re.findall(r"/opt/reinforce/(\S+\.py)", job["entrypoint"])
    assert (ROOT / script).is_file()
    for image in IMAGES:
        assert f"COPY jobs /opt/reinforce/{Path(script).parent}" in (DEPLOY / f"docker/{image}.Dockerfile").read_text()


def test_the_schema_of_kubernetes_is_that_of_the_package(deploy_tools: Path) -> None:
    code = "import tests.deploy.kubernetes_schema as k; print(k.text(), end='')"
    assert output_of(deploy_tools / "python", "-c", code) == KUBERNETES.read_text()


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_accepts_the_cluster(cloud: str) -> None:
    config = prepare_config(launcher(cloud))
    validate_config(config)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}, "no workers on the head"
    assert {name: kind["max_workers"] for name, kind in types.items() if name != "head"} == {"gpu": 2, "gpu-spot": 64}
    assert config["max_workers"] == 66
    assert any("drain_on_notice" in command for command in config["worker_start_ray_commands"])


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
    printed = output_of(deploy_tools / "python", "-c", _PARSE, "deploy/skypilot/reinforce.yaml")
    task = json.loads(printed.splitlines()[-1])
    assert task["resources"]
    for spot, recovery, accelerators in task["resources"]:
        assert spot
        assert recovery["strategy"] == "EAGER_NEXT_REGION"
        assert len(accelerators) == 1
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    assert task["secrets"] == ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
