"""Kubernetes files held against what would read them: the operator's CRDs made strict, Kubernetes' own schemas, and
the rules that neither can say."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
RAY_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
SUFFIX = 5
"""Characters that Kubernetes puts behind a generateName."""


def documents(file: Path) -> list[Document]:
    return [found for found in yaml.load_all(file.read_text(encoding="utf-8"), yaml.CSafeLoader) if found]


@cache
def crd_schema(folder: Path, kind: str) -> Document:
    """The strict schema of `kind`, version v1, from the gzipped CRDs in `folder`."""
    text = gzip.decompress((folder / f"ray.io_{RAY_KINDS[kind]}.yaml.gz").read_bytes())
    versions = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
    return strict(next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"])


def strict(schema: Any) -> Any:
    """`schema` that refuses fields it does not name. `metadata` of the object itself it leaves to Kubernetes."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    properties = schema.get("properties")
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(properties, dict) and schema.get("type") == "object" and not open_ended:
        made.setdefault("additionalProperties", False)
    return made


def schema_errors(schema: Document, document: Document) -> list[str]:
    from jsonschema import Draft202012Validator

    # `metadata` is `type: object` alone in every CRD: Kubernetes knows it
    found = Draft202012Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]


def cel_rules(schema: Any) -> set[str]:
    """All rules of `x-kubernetes-validations` in `schema`."""
    if isinstance(schema, list):
        return {rule for part in schema for rule in cel_rules(part)}
    if not isinstance(schema, dict):
        return set()
    own = {each["rule"] for each in schema.get("x-kubernetes-validations", [])}
    return own | {rule for value in schema.values() for rule in cel_rules(value)}


CEL = {
    "self == oldSelf",  # of changes, which a file does not make
    f"self in {list(MANAGERS)}",
    "!((has(self.onSuccess) || has(self.onFailure)) && has(self.deletionRules))",
    "((has(self.onSuccess) && has(self.onFailure)) || has(self.deletionRules))",
    "!(has(self.jobStatus) && has(self.jobDeploymentStatus))",
    "has(self.jobStatus) || has(self.jobDeploymentStatus)",
}
"""The rules that `cel_errors` checks: a CRD with others needs more of it."""


def cel_errors(document: Document) -> list[str]:
    found: list[str] = []
    for path, value in walk(document["spec"]):
        if path.endswith("managedBy") and value not in MANAGERS:
            found.append(f"{path}: {value}")
        if path.endswith("deletionStrategy"):
            one_by_one = {"onSuccess", "onFailure"} & value.keys()
            if bool(one_by_one) == ("deletionRules" in value) or len(one_by_one) == 1:
                found.append(f"{path}: onSuccess and onFailure, or deletionRules")
        of_a_rule = path.endswith(".condition") and "deletionRules" in path
        if of_a_rule and len({"jobStatus", "jobDeploymentStatus"} & value.keys()) != 1:
            found.append(f"{path}: one of jobStatus and jobDeploymentStatus")
    return found


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from walk(inner, f"{path}.{key}")


def cluster_of(document: Document) -> Document:
    """The spec of the RayCluster that a document is, or brings."""
    spec = document["spec"]
    return spec if document["kind"] == "RayCluster" else spec.get("rayClusterSpec") or spec["rayClusterConfig"]


def operator_errors(document: Document) -> list[str]:
    """What the operator refuses although its CRDs let it pass (its `validation.go`)."""
    found: list[str] = []
    kind, metadata, spec, cluster = document["kind"], document["metadata"], document["spec"], cluster_of(document)
    name, length = metadata.get("name"), 0
    if name is None:
        name = metadata["generateName"]
        length = SUFFIX
        if not re.fullmatch(r"[a-z][a-z0-9-]*-", name):
            found.append(f"generateName {name}")
    elif not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        found.append(f"name {name}")
    if len(name) + length > LONGEST_NAME[kind]:
        found.append(f"name {name} is too long")
    groups = cluster["workerGroupSpecs"]
    autoscaling = cluster.get("enableInTreeAutoscaling", False)
    version = cluster.get("autoscalerOptions", {}).get("version")
    for group in groups:
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if not autoscaling and None in (least, most):
            found.append(f"{group['groupName']}: minReplicas and maxReplicas")
        if None not in (least, most) and not 0 <= least <= group.get("replicas", least) <= most:
            found.append(f"{group['groupName']}: 0 ≤ minReplicas ≤ replicas ≤ maxReplicas")
    for part in [cluster["headGroupSpec"], *groups]:
        pod = part["template"]["spec"]
        if version == "v2" and pod.get("restartPolicy", "Never") != "Never":
            found.append("autoscaler v2 wants restartPolicy Never")
        if "labels" in part["rayStartParams"]:
            found.append("rayStartParams.labels")
    given = {variable["name"] for variable in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]}
    if own := given & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}:
        found.append(f"the operator sets {', '.join(sorted(own))}")
    ray = tuple(map(int, cluster.get("rayVersion", "0.0").split(".")[:2]))
    if cluster.get("authOptions", {}).get("mode") == "token" and ray < (2, 52):
        found.append("tokens take rayVersion 2.52 or later")
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        found.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    if kind == "RayJob" and "queue-name" in str(metadata.get("labels")) and autoscaling:
        found.append("Kueue does not admit a cluster that changes its size")
    return found


def pods(document: Document) -> Iterator[tuple[str, Document]]:
    """(where, template) of every pod that a document brings."""
    for path, value in walk(document):
        if isinstance(value, dict) and isinstance(value.get("spec"), dict) and "containers" in value["spec"]:
            yield f"{document['kind']}{path}", value


def pod_errors(where: str, template: Document) -> list[str]:
    """What a pod may do that it need not, and resources that are not both asked for and bounded."""
    found: list[str] = []
    pod = template["spec"]
    own = pod.get("securityContext", {})
    if own.get("runAsNonRoot") is not True or not own.get("runAsUser"):
        found.append(f"{where}: runAsNonRoot with a runAsUser")
    if own.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append(f"{where}: seccompProfile RuntimeDefault")
    for container in pod.get("initContainers", []) + pod["containers"]:
        name = f"{where}: {container['name']}"
        found += container_errors(name, container)
        if not re.search(r":[^:/]*\d[^:/]*(@sha256:[0-9a-f]{64})?$", container["image"]):
            found.append(f"{name}: {container['image']} has no version")
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        if missing := mounts - {volume["name"] for volume in pod.get("volumes", [])} - {"data"}:
            found.append(f"{name}: no volume {', '.join(missing)}")
    return found


def container_errors(name: str, container: Document) -> list[str]:
    found: list[str] = []
    safety = container.get("securityContext", {})
    if safety.get("allowPrivilegeEscalation") is not False:
        found.append(f"{name}: allowPrivilegeEscalation")
    if safety.get("capabilities", {}).get("drop") != ["ALL"]:
        found.append(f"{name}: capabilities")
    resources = container.get("resources", {})
    if not resources.get("requests") or resources.get("requests") != resources.get("limits"):
        found.append(f"{name}: requests {resources.get('requests')}, limits {resources.get('limits')}")
    return found
