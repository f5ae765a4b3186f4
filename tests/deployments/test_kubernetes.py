"""The manifests and the pools' templates, against the schema of the Kubernetes API and against each other."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from blocks.config.paths import MODEL_CONTAINERS, PROJECT_ROOT
from blocks.config.pools import CPU, GPU
from blocks.engines.base import StageRun
from blocks.engines.kubernetes.job import SETTINGS, StageJob, read_cluster, translate_spec

FOLDER = PROJECT_ROOT / "deployments" / "kubernetes"
VERSION = "1.37"
# Made by whoever installs it, as docs/kubernetes.md says; they stand in no file.
SECRETS = {"calipert-prefect", "calipert-mlflow", "calipert-store"}
POOLS = (CPU, GPU)


def manifests() -> list[dict[str, Any]]:
    files = kustomization()["resources"]
    return [one for file in files for one in yaml.safe_load_all((FOLDER / file).read_text(encoding="utf-8"))]


def kustomization() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text(encoding="utf-8"))
    return found


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [one for one in manifests() if one["kind"] == kind]


def template(pool: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "pools" / f"{pool}.json").read_text(encoding="utf-8"))
    return found


def flow_run_job(pool: str) -> dict[str, Any]:
    """The Job that Prefect makes of a pool's template with its defaults, a command and the flow run's name."""
    from prefect.utilities.templating import apply_values

    whole = template(pool)
    values = {name: one["default"] for name, one in whole["variables"]["properties"].items() if "default" in one}
    filled = apply_values(whole["job_configuration"], values | {"name": "quick-fox", "command": ["prefect"]})
    job: dict[str, Any] = filled["job_manifest"]
    return job


def stage_job() -> dict[str, Any]:
    cluster = read_cluster(FOLDER / "cluster.yaml")
    spec = {"output": "/output"}
    run = StageRun("train", Path("fmlp"), spec, lambda event: None, 60.0, None, 0.0)
    inputs = translate_spec(spec, Path("/store"))
    job = StageJob(cluster, run, inputs, "s3://calipert/store", str(uuid.uuid4()), "1", None)
    return job.manifest()


def pods() -> dict[str, dict[str, Any]]:
    """Every pod that runs in the namespace, with its labels, by what it is."""
    found = {one["metadata"]["name"]: one["spec"]["template"] for one in of_kind("Deployment")}
    found |= {f"flow run of {pool}": flow_run_job(pool)["spec"]["template"] for pool in POOLS}
    return found | {"stage of a model": stage_job()["spec"]["template"]}


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def test_every_manifest_fits_the_api() -> None:
    assert {one["kind"] for one in manifests()} >= {
        "Namespace",
        "ServiceAccount",
        "Role",
        "NetworkPolicy",
        "Deployment",
    }
    for one in manifests():
        kubernetes_validate.validate(one, VERSION, strict=True)


def test_a_misspelt_manifest_would_be_found() -> None:
    (policy,) = of_kind("NetworkPolicy")
    policy["spec"]["podSelectors"] = policy["spec"].pop("podSelector")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(policy, VERSION, strict=True)


@pytest.mark.parametrize("pool", POOLS)
def test_a_pools_jobs_fit_the_api(pool: str) -> None:
    job = flow_run_job(pool)
    # The worker takes no template without these two, which are none of a pod's; the API drops them.
    assert job["spec"]["template"]["spec"].pop("completions") == 1
    assert job["spec"]["template"]["spec"].pop("parallelism") == 1
    job["metadata"]["annotations"] = {}
    assert "{{" not in json.dumps(job)
    kubernetes_validate.validate(job, VERSION, strict=True)


def test_what_the_templates_leave_open_has_a_variable() -> None:
    from prefect.utilities.templating import find_placeholders

    for pool in POOLS:
        whole = template(pool)
        wanted = {placeholder.name for placeholder in find_placeholders(whole["job_configuration"])}
        assert wanted == whole["variables"]["properties"].keys()


def test_every_file_is_used() -> None:
    named = {*kustomization()["resources"], "kustomization.yaml"}
    for generator in kustomization()["configMapGenerator"]:
        named |= {*generator.get("files", []), *generator.get("envs", [])}
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == named
    assert {path.stem for path in (FOLDER / "pools").iterdir()} == set(POOLS)


def test_what_pods_refer_to_is_there() -> None:
    accounts = {one["metadata"]["name"] for one in of_kind("ServiceAccount")}
    maps = {one["name"] for one in kustomization()["configMapGenerator"]}
    assert kustomization()["generatorOptions"] == {"disableNameSuffixHash": True}
    for name, pod in pods().items():
        assert pod["spec"].get("serviceAccountName", "calipert-flow") in accounts, name
        for container in containers(pod):
            for source in container.get("envFrom", []):
                assert source.get("configMapRef", {}).get("name") in {None, *maps}
                assert source.get("secretRef", {}).get("name") in {None, *SECRETS}
        for volume in pod["spec"]["volumes"]:
            assert volume.get("configMap", {}).get("name") in {None, *maps}
    for binding in of_kind("RoleBinding"):
        assert binding["roleRef"]["name"] in {role["metadata"]["name"] for role in of_kind("Role")}
        assert {subject["name"] for subject in binding["subjects"]} <= accounts


def test_no_secret_stands_in_a_file() -> None:
    assert not of_kind("Secret")
    settings = (FOLDER / "settings.env").read_text(encoding="utf-8")
    assert not [
        line for line in settings.splitlines() if any(word in line for word in ("SECRET", "PASSWORD", "AUTH", "KEY"))
    ]


def test_accounts_may_do_what_they_need_and_no_more() -> None:
    rules = {
        role["metadata"]["name"]: {
            f"{group}/{resource}": set(rule["verbs"])
            for rule in role["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
        }
        for role in of_kind("Role")
    }
    assert rules == {
        "calipert-worker": {
            "batch/jobs": {"create", "get", "list", "watch", "delete"},
            "/pods": {"get", "list", "watch"},
            "/pods/log": {"get"},
        },
        # What blocks.engines.kubernetes.api asks for.
        "calipert-flow": {"batch/jobs": {"create", "get", "delete"}, "/pods": {"list"}, "/pods/log": {"get"}},
    }
    assert not of_kind("ClusterRole")


def test_no_pod_may_do_what_the_namespace_forbids() -> None:
    (namespace,) = of_kind("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, pod in pods().items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all({"emptyDir", "configMap"} & volume.keys() for volume in spec["volumes"])
        for container in containers(pod):
            walls = container["securityContext"]
            assert walls["allowPrivilegeEscalation"] is False
            assert walls["capabilities"] == {"drop": ["ALL"]}
            assert walls["readOnlyRootFilesystem"] is True
            assert container["resources"]["limits"].keys() >= {"cpu", "memory"}


def selected(policy: dict[str, Any], labels: dict[str, str]) -> bool:
    (expression,) = policy["spec"]["podSelector"]["matchExpressions"]
    assert expression["operator"] == "Exists"
    return expression["key"] in labels


def test_models_alone_are_walled_off_and_reach_the_store_alone() -> None:
    (policy,) = of_kind("NetworkPolicy")
    walled = {name for name, pod in pods().items() if selected(policy, pod["metadata"]["labels"])}
    assert walled == {"stage of a model"}
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert policy["spec"]["ingress"] == []
    names, store = policy["spec"]["egress"]
    assert {port["port"] for port in names["ports"]} == {53}
    assert store["to"] == [{"ipBlock": {"cidr": "192.0.2.10/32"}}]


def test_the_settings_name_every_model() -> None:
    cluster = read_cluster(FOLDER / "cluster.yaml")
    assert cluster.models.keys() == {folder.parent.name for folder in MODEL_CONTAINERS.glob("*/model.py")}
    assert cluster.namespace == kustomization()["namespace"]
    assert cluster.store_secret in SECRETS
    assert cluster.api is None


@pytest.mark.parametrize("pool", POOLS)
def test_flow_runs_use_the_kubernetes_engine(pool: str) -> None:
    (container,) = flow_run_job(pool)["spec"]["template"]["spec"]["containers"]
    values = {one["name"]: one.get("value") for one in container["env"]}
    assert values["CALIPERT_ENGINE"] == "kubernetes"
    folder, _, file = str(values[SETTINGS]).rpartition("/")
    assert file == "cluster.yaml"
    assert folder in [mount["mountPath"] for mount in container["volumeMounts"]]
    owner = {one["name"]: one["valueFrom"]["fieldRef"]["fieldPath"] for one in container["env"] if "valueFrom" in one}
    assert owner == {"CALIPERT_POD_NAME": "metadata.name", "CALIPERT_POD_UID": "metadata.uid"}


@pytest.mark.parametrize("pool", POOLS)
def test_each_pool_has_a_worker(pool: str) -> None:
    commands = [one["args"] for pod in pods().values() for one in containers(pod) if one["name"] == "worker"]
    assert [command[command.index("--pool") + 1] for command in commands].count(pool) == 1
    assert all(command[command.index("--type") + 1] == "kubernetes" for command in commands)
