"""cluster/kuberay: every file is what its reader takes, and each check can fail."""

from __future__ import annotations

import copy
import gzip
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.kubernetes import (
    CEL,
    RAY_KINDS,
    cel_errors,
    cel_rules,
    cluster_of,
    container_errors,
    crd_schema,
    documents,
    operator_errors,
    pod_errors,
    pods,
    schema_errors,
)

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "kuberay"
FILES = sorted(FOLDER.glob("*.yaml"))
ALL = [(file, found) for file in FILES for found in documents(file)]
RAY = [(file, found) for file, found in ALL if found["kind"] in RAY_KINDS]
KUEUE = {
    "ResourceFlavor": set(),
    "ClusterQueue": {"namespaceSelector", "resourceGroups"},
    "LocalQueue": {"clusterQueue"},
}
"""Fields of their specs that the files use; Kueue's CRDs are not at hand."""


def name(value: Any) -> str:
    return value.name if isinstance(value, Path) else value.get("kind", "?") if isinstance(value, dict) else str(value)


@pytest.fixture(scope="module")
def crds(ftray_data: Path) -> Path:
    folder = ftray_data / "schemas" / "kuberay"
    if not folder.is_dir():
        pytest.skip(f"there are no CRDs in {folder}")
    return folder


def a_copy(kind: str) -> dict[str, Any]:
    return copy.deepcopy(next(found for _, found in RAY if found["kind"] == kind))


def worker_of(document: dict[str, Any]) -> dict[str, Any]:
    return cluster_of(document)["workerGroupSpecs"][0]


# ------------------------------------------------------------------------------------------------ the operator's kinds


def test_there_is_a_file_for_each_kind() -> None:
    assert {found["kind"] for _, found in RAY} == set(RAY_KINDS)
    assert {"train", "tune"} == {
        found["metadata"]["labels"]["ftray/part"] for _, found in RAY if found["kind"] == "RayJob"
    }


@pytest.mark.parametrize(("file", "document"), RAY, ids=name)
def test_ray_files_fit_the_operator(crds: Path, file: Path, document: dict[str, Any]) -> None:
    assert document["apiVersion"] == "ray.io/v1"
    assert schema_errors(crd_schema(crds, document["kind"]), document) == []
    assert cel_errors(document) == []
    assert operator_errors(document) == []


def misspelled_in_the_cluster(document: dict[str, Any]) -> None:
    cluster_of(document)["authOption"] = {"mode": "token"}


def misspelled_in_a_pod(document: dict[str, Any]) -> None:
    worker_of(document)["template"]["spec"]["containers"][0]["volumeMount"] = []


def misspelled_grace(document: dict[str, Any]) -> None:
    worker_of(document)["template"]["spec"]["terminationGracePeriodSecond"] = 3


def a_number_as_text(document: dict[str, Any]) -> None:
    worker_of(document)["minReplicas"] = "two"


def another_mode(document: dict[str, Any]) -> None:
    cluster_of(document)["authOptions"]["mode"] = "tokens"


@pytest.mark.parametrize("kind", RAY_KINDS)
@pytest.mark.parametrize(
    "spoil",
    [misspelled_in_the_cluster, misspelled_in_a_pod, misspelled_grace, a_number_as_text, another_mode],
    ids=lambda f: f.__name__,
)
def test_what_the_crd_does_not_know_is_refused(crds: Path, kind: str, spoil: Callable[[dict[str, Any]], None]) -> None:
    document = a_copy(kind)
    spoil(document)
    assert schema_errors(crd_schema(crds, kind), document)


@pytest.mark.parametrize("kind", RAY_KINDS)
def test_every_cel_rule_of_the_crds_is_checked(crds: Path, kind: str) -> None:
    assert cel_rules(crd_schema(crds, kind)) <= {rule.replace('"', "'") for rule in CEL}


@pytest.mark.parametrize(
    "fields",
    [
        {"managedBy": "somebody"},
        {"deletionStrategy": {}},
        {"deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}}},
        {"deletionStrategy": {"onSuccess": {}, "onFailure": {}, "deletionRules": []}},
        {"deletionStrategy": {"deletionRules": [{"condition": {}, "policy": "DeleteSelf"}]}},
        {
            "deletionStrategy": {
                "deletionRules": [{"condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}]
            }
        },
    ],
    ids=str,
)
def test_what_the_cel_rules_forbid_is_refused(fields: dict[str, Any]) -> None:
    document = a_copy("RayJob")
    document["spec"] |= fields
    assert cel_errors(document)


def test_the_other_deletion_strategies_pass() -> None:
    document = a_copy("RayJob")
    for strategy in (
        {"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteNone"}},
        {"deletionRules": [{"condition": {"jobStatus": "FAILED"}, "policy": "DeleteSelf"}]},
    ):
        document["spec"]["deletionStrategy"] = strategy
        assert cel_errors(document) == []


def test_what_the_operator_refuses_is_refused() -> None:
    def spoiled(kind: str, spoil: Callable[[dict[str, Any]], Any]) -> list[str]:
        document = a_copy(kind)
        spoil(document)
        return operator_errors(document)

    assert spoiled("RayJob", lambda d: d["metadata"].update(generateName="Train-"))
    assert spoiled("RayJob", lambda d: d["metadata"].update(generateName="a" * 43 + "-"))
    assert spoiled("RayCluster", lambda d: d["metadata"].update(name="a" * 54))
    assert spoiled("RayJob", lambda d: worker_of(d).pop("maxReplicas"))
    assert spoiled("RayJob", lambda d: worker_of(d).update(replicas=9))
    assert spoiled("RayJob", lambda d: d["spec"].update(shutdownAfterJobFinishes=False))
    assert spoiled("RayJob", lambda d: cluster_of(d).update(enableInTreeAutoscaling=True))
    assert spoiled("RayCluster", lambda d: worker_of(d)["template"]["spec"].update(restartPolicy="Always"))
    assert spoiled("RayCluster", lambda d: d["spec"].pop("rayVersion"))
    environment = [{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}]
    head = ("headGroupSpec", "template", "spec", "containers", 0, "env")

    def name_redis(document: dict[str, Any]) -> None:
        place: Any = cluster_of(document)
        for key in head:
            place = place[key]
        place.extend(environment)

    assert spoiled("RayCluster", name_redis)


# --------------------------------------------------------------------------------------------------- what they promise


@pytest.mark.parametrize(("file", "document"), RAY, ids=name)
def test_every_cluster_asks_for_the_token_and_works_elsewhere_than_on_its_head(
    file: Path, document: dict[str, Any]
) -> None:
    cluster = cluster_of(document)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ftray-ray-token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    if cluster.get("enableInTreeAutoscaling"):
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert container_errors("autoscaler", cluster["autoscalerOptions"]) == []
    if document["kind"] != "RayJob":
        options = cluster["gcsFaultToleranceOptions"]
        assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "ftray-redis"
        services = {found["metadata"]["name"] for _, found in ALL if found["kind"] == "Service"}
        assert options["redisAddress"].split(":")[0] in services


@pytest.mark.parametrize(("file", "document"), RAY, ids=name)
def test_a_pod_that_ends_has_time_to_commit(file: Path, document: dict[str, Any]) -> None:
    """The deadline that Ray is told, the wait for the workers, and what `ray job stop` waits lie within the grace."""
    cluster = cluster_of(document)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        waits = [int(e["value"]) for e in container["env"] if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
        words = " ".join(container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", []))
        waits += [int(found) for found in re.findall(r"(?:deadline-remaining-seconds|timeout) (\d+)", words)]
        assert waits or document["kind"] == "RayService"
        # the longest wait, after 20 s in which the cluster is told
        assert max(waits, default=0) + 20 < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(("file", "document"), [(f, d) for f, d in RAY if d["kind"] != "RayService"], ids=name)
def test_a_pod_that_ends_waits_for_whatever_trains_in_it(file: Path, document: dict[str, Any]) -> None:
    """Workers of runs, and the hosts of lanes, as Ray calls their processes."""
    from ftray.tune.host import Host

    for group in cluster_of(document)["workerGroupSpecs"]:
        *_, script = group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        (pattern,) = re.findall(r'pgrep -f "(.*?)"', script)
        for process in ("ray::RayTrainWorker.execute", f"ray::{Host.__name__}", f"ray::{Host.__name__}.next"):
            assert re.search(pattern, process), process
        for process in (f"bash -c {script}", "ray::IDLE", "/usr/bin/raylet", "ray::DashboardAgent"):
            assert not re.search(pattern, process), process


def test_budgets_are_whole_numbers_of_pods_that_stay(crds: Path) -> None:
    """Kubernetes takes no other for pods whose owner has no scale subresource."""
    for kind, plural in RAY_KINDS.items():
        text = gzip.decompress((crds / f"ray.io_{plural}.yaml.gz").read_bytes())
        versions = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
        assert not any("scale" in version.get("subresources", {}) for version in versions), kind
    budgets = {d["metadata"]["name"]: d["spec"] for _, d in ALL if d["kind"] == "PodDisruptionBudget"}
    for budget in budgets.values():
        assert budget.keys() == {"minAvailable", "selector"}
        assert isinstance(budget["minAvailable"], int)
    assert budgets["engines"]["minAvailable"] == worker_of(a_copy("RayService"))["minReplicas"] - 1
    assert budgets["heads-of-runs"]["minAvailable"] > 100, "more than there are: none may be taken"


def test_the_queue_that_jobs_wait_in_exists() -> None:
    queues = {found["metadata"]["name"] for _, found in ALL if found["kind"] == "LocalQueue"}
    for _, document in RAY:
        queue = document["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
        assert queue in queues or document["kind"] == "RayCluster"


@pytest.mark.parametrize(("file", "document"), [(f, d) for f, d in ALL if list(pods(d))], ids=name)
def test_pods_may_do_no_more_than_they_need(file: Path, document: dict[str, Any]) -> None:
    for where, template in pods(document):
        assert pod_errors(where, template) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p["securityContext"].update(runAsNonRoot=False),
        lambda p: p["securityContext"].pop("seccompProfile"),
        lambda p: p["containers"][0]["securityContext"].update(allowPrivilegeEscalation=True),
        lambda p: p["containers"][0]["securityContext"].pop("capabilities"),
        lambda p: p["containers"][0]["resources"]["limits"].update(memory="1Ti"),
        lambda p: p["containers"][0].update(image="redis"),
        lambda p: p["containers"][0].update(image="redis:latest"),
        lambda p: p["containers"][0]["volumeMounts"].append({"name": "nowhere"}),
    ],
)
def test_a_pod_that_may_do_more_is_refused(spoil: Callable[[dict[str, Any]], Any]) -> None:
    where, template = next(pods(a_copy("RayService")))
    assert pod_errors(where, template) == []
    spoil(template["spec"])
    assert pod_errors(where, template)


def test_every_secret_claim_and_map_that_a_pod_names_is_made_somewhere() -> None:
    made = {(found["kind"], found.get("metadata", {}).get("name")) for _, found in ALL}
    kustomization = documents(FOLDER / "kustomization.yaml")[0]
    made |= {("ConfigMap", each["name"]) for each in kustomization["configMapGenerator"]}
    readme = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    made |= {("Secret", each) for each in re.findall(r"create secret generic ([\w-]+)", readme)}
    for _, document in ALL:
        text = yaml.safe_dump(document)
        named = {("Secret", n) for n in re.findall(r"secretName: ([\w-]+)", text)}
        named |= {("PersistentVolumeClaim", n) for n in re.findall(r"claimName: ([\w-]+)", text)}
        for _, template in pods(document):
            volumes = template["spec"].get("volumes", [])
            named |= {("ConfigMap", v["configMap"]["name"]) for v in volumes if "configMap" in v}
            containers = template["spec"]["containers"]
            variables = [e["valueFrom"] for c in containers for e in c.get("env", []) if "valueFrom" in e]
            named |= {("Secret", v["secretKeyRef"]["name"]) for v in variables if "secretKeyRef" in v}
        assert named <= made


# ---------------------------------------------------------------------------------------------- Kubernetes' own kinds


def kubernetes_errors(document: dict[str, Any]) -> str | None:
    validate = pytest.importorskip("kubernetes_validate")
    try:
        validate.validate(document, validate.latest_version(), strict=True)
    except validate.ValidationError as error:
        return str(error.message)
    return None


CORE = [(f, d) for f, d in ALL if d["kind"] not in (*RAY_KINDS, *KUEUE, "Kustomization")]


@pytest.mark.parametrize(("file", "document"), CORE, ids=name)
def test_core_files_fit_kubernetes(file: Path, document: dict[str, Any]) -> None:
    assert kubernetes_errors(document) is None


@pytest.mark.parametrize(
    ("kind", "place", "key"),
    [
        ("NetworkPolicy", ("spec",), "podSelectors"),
        ("PodDisruptionBudget", ("spec",), "minAvailables"),
        ("PersistentVolumeClaim", ("spec", "resources"), "request"),
        ("StatefulSet", ("spec", "template", "spec"), "container"),
        ("Service", ("spec",), "port"),
    ],
)
def test_a_misspelled_field_of_kubernetes_is_refused(kind: str, place: tuple[str, ...], key: str) -> None:
    document = copy.deepcopy(next(found for _, found in CORE if found["kind"] == kind))
    inner = document
    for step in place:
        inner = inner[step]
    inner[key] = {}
    assert kubernetes_errors(document)


def test_kueue_files_have_known_fields_and_fit_together() -> None:
    found = {d["kind"]: d for _, d in ALL if d["kind"] in KUEUE}
    assert found.keys() == KUEUE.keys()
    for kind, document in found.items():
        assert document["apiVersion"] == "kueue.x-k8s.io/v1beta1"
        assert document.get("spec", {}).keys() == KUEUE[kind]
    queue = found["ClusterQueue"]
    assert found["LocalQueue"]["spec"]["clusterQueue"] == queue["metadata"]["name"]
    for group in queue["spec"]["resourceGroups"]:
        for flavor in group["flavors"]:
            assert flavor["name"] == found["ResourceFlavor"]["metadata"]["name"]
            assert [r["name"] for r in flavor["resources"]] == group["coveredResources"]
    asked = {
        key
        for _, document in RAY
        for _, template in pods(document)
        for container in template["spec"]["containers"]
        for key in container["resources"]["requests"]
    }
    assert asked <= set(queue["spec"]["resourceGroups"][0]["coveredResources"]), (
        "Kueue admits nothing it does not cover"
    )


def test_the_kustomization_lists_files_that_are_there() -> None:
    kustomization = documents(FOLDER / "kustomization.yaml")[0]
    assert kustomization.keys() == {"apiVersion", "kind", "resources", "configMapGenerator", "generatorOptions"}
    listed = set(kustomization["resources"])
    assert all((FOLDER / each).is_file() for each in listed)
    rest = {file.name for file in FILES} - listed - {"kustomization.yaml"}
    assert rest == {"raycluster.yaml", "rayjob-train.yaml", "rayjob-tune.yaml", "rayservice.yaml"}
    for generator in kustomization["configMapGenerator"]:
        assert {FOLDER / each for each in generator["files"]} == set((FOLDER / "runs").glob("*.yaml"))


def test_kustomize_builds_it() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl here")
    built = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True, check=True).stdout
    found = [each for each in yaml.safe_load_all(built) if each]
    assert all(each["metadata"].get("namespace", "ftray") == "ftray" for each in found)
    runs = next(each for each in found if each["kind"] == "ConfigMap")
    assert runs["metadata"]["name"] == "ftray-runs"
    assert runs["data"]["train.yaml"] == (FOLDER / "runs" / "train.yaml").read_text(encoding="utf-8")


def test_network_policies_select_what_the_files_and_the_operator_label() -> None:
    """Our labels are on some pod, the operator's are among those that it is known to set."""
    operators = {"ray.io/is-ray-node", "ray.io/node-type", "ray.io/cluster"}
    ours = {"app": {"redis"}}
    for _, document in RAY:
        for _, template in pods(document):
            for key, value in template["metadata"]["labels"].items():
                ours.setdefault(key, set()).add(value)
    for _, document in ALL:
        if document["kind"] in ("NetworkPolicy", "PodDisruptionBudget"):
            selectors = re.findall(
                r"podSelector:\n\s+matchLabels:\n\s+([\w./-]+): '?([\w-]+)", yaml.safe_dump(document)
            )
            for key, value in selectors:
                assert key in operators or value in ours[key]
