"""Deployments on other work pools: what they say is what the pool's worker knows. No cluster is started for this."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.utilities.schema_tools.validation import validate
from prefect.utilities.templating import apply_values, find_placeholders

from flows import evaluate, pretrain

ROOT = Path(__file__).parents[1]
POOLS = ROOT / "pools"
FLOWS = {"flows.pretrain.pretrain": pretrain.pretrain, "flows.evaluate.evaluate": evaluate.evaluate}
TEMPLATE = json.loads((POOLS / "kubernetes-job-template.json").read_text(encoding="utf-8"))


def deployments(file: str) -> list[dict[str, Any]]:
    text = (POOLS / file).read_text(encoding="utf-8").replace("{{ $PWD }}", "/srv/gpt2")
    return yaml.safe_load(text)["deployments"]


def resumed_environment() -> dict[str, str]:
    """What the local deployments give to runs that are taken up again."""
    local = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    return local[0]["work_pool"]["job_variables"]["env"]


def as_job(configuration: type, template: dict[str, Any], job_variables: dict[str, Any]) -> Any:
    """What the worker makes of them. Raises when a variable is unknown or of another type."""
    validate(job_variables, template["variables"], raise_on_error=True)
    known = template["variables"]["properties"]
    assert job_variables.keys() <= known.keys()
    defaults = {name: schema["default"] for name, schema in known.items() if schema.get("default") is not None}
    return configuration(**apply_values(template["job_configuration"], defaults | job_variables))


@pytest.mark.parametrize("file", ["kubernetes.yaml", "slurm.yaml"])
def test_parameters_are_those_of_the_flows(file: str):
    for deployment in deployments(file):
        flow = FLOWS[deployment["entrypoint"]]
        validate(deployment.get("parameters", {}), flow.parameters.model_dump(), raise_on_error=True)


def test_the_kubernetes_template_has_a_variable_for_each_placeholder():
    placeholders = {found.name for found in find_placeholders(TEMPLATE["job_configuration"])}
    assert placeholders == TEMPLATE["variables"]["properties"].keys()


def test_kubernetes_jobs_have_gpus_shared_memory_the_volume_and_time_to_save():
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="pip install 'gpt2-pipeline[kubernetes]'")
    default = worker.KubernetesWorker.get_default_base_job_template()
    assert default["variables"]["properties"].keys() <= TEMPLATE["variables"]["properties"].keys()
    pipeline, evaluation = deployments("kubernetes.yaml")
    for deployment, gpus in [(pipeline, 8), (evaluation, 1)]:
        job = as_job(worker.KubernetesWorkerJobConfiguration, TEMPLATE, deployment["work_pool"]["job_variables"])
        pod = job.job_manifest["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
        assert container["image"] == "registry.example.org/gpt2-pipeline:latest"
        assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "gpt2"}
        assert pod["volumes"][1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}
        assert pod["terminationGracePeriodSeconds"] == 180
        assert job.env == resumed_environment()


def test_slurm_jobs_say_what_the_worker_asks_slurm_for():
    worker = pytest.importorskip("prefect_slurm.worker", reason="pip install 'gpt2-pipeline[slurm]'")
    (pipeline,) = deployments("slurm.yaml")
    template = worker.SlurmWorker.get_default_base_job_template()
    job = as_job(worker.SlurmWorkerConfiguration, template, pipeline["work_pool"]["job_variables"])
    assert (job.partition, job.cpu, job.memory, job.time_limit) == ("gpu", 32, 256, 72)
    assert str(job.working_dir) == "/srv/gpt2"
    assert job.env == resumed_environment()


def test_the_batch_script_is_one():
    checked = subprocess.run(["bash", "-n", POOLS / "slurm-worker.sbatch"], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
