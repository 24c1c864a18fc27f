"""The chart, rendered by Helm over a matrix of values: one file in `cases` each."""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.deploy.tools import ROOT, helm

Manifest = dict[str, Any]
CHART = ROOT / "deploy" / "helm" / "tercet"
HERE = Path(__file__).parent
CASES = sorted(path.stem for path in (HERE / "cases").glob("*.yaml"))
PLAIN = [case for case in CASES if "mode: plain" in (HERE / "cases" / f"{case}.yaml").read_text()]
WITH_KUBERAY = [case for case in CASES if case not in PLAIN]
KUBERAY = Path(os.environ.get("KUBERAY_SCHEMAS", ROOT.parent / "shared" / "kuberay"))
RELEASE = "demo"


def run_helm(*words: str, binary: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([binary or helm(), *words], capture_output=True, text=True, timeout=60, check=False)


def template(*words: str) -> str:
    done = run_helm("template", RELEASE, str(CHART), "--namespace", "inference", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def text_of(case: str) -> str:
    return template("-f", str(HERE / "cases" / f"{case}.yaml"))


def parsed(text: str) -> list[Manifest]:
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]


def rendered(case: str) -> list[Manifest]:
    return parsed(text_of(case))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [one for one in manifests if one["kind"] == kind]


def spec_of(manifests: list[Manifest]) -> dict[str, Any]:
    """The cluster spec in the ConfigMap."""
    (config,) = of_kind(manifests, "ConfigMap")
    return yaml.safe_load(config["data"]["spec.yaml"])


def pods_of(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod that would run: where it is said, and its template (metadata, spec)."""
    for one in manifests:
        name, spec = f"{one['kind']}/{one['metadata']['name']}", one.get("spec", {})
        match one["kind"]:
            case "Pod":
                yield name, one
            case "StatefulSet":
                yield name, spec["template"]
            case "RayCluster":
                yield f"{name} head", spec["headGroupSpec"]["template"]
                for group in spec["workerGroupSpecs"]:
                    yield f"{name} {group['groupName']}", group["template"]
            case "RayJob":
                yield name, spec["submitterPodTemplate"]


def containers_of(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Where it is said, its pod, the container."""
    for where, pod in pods_of(manifests):
        for one in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]:
            yield f"{where} {one['name']}", pod, one


def head_of(manifests: list[Manifest]) -> Manifest:
    return next(pod for _, pod in pods_of(manifests) if component(pod) == "head")


def component(pod: Manifest) -> str:
    return pod["metadata"]["labels"]["app.kubernetes.io/component"]


def container(pod: Manifest, name: str) -> Manifest:
    return next(one for one in pod["spec"]["containers"] if one["name"] == name)


@functools.cache
def crd(plural: str) -> jsonschema.Draft202012Validator:
    """KubeRay's own schema of v1, which also refuses what the API server would drop in silence."""
    definition = yaml.load(gzip.decompress((KUBERAY / f"ray.io_{plural}.yaml.gz").read_bytes()), yaml.CSafeLoader)
    version = next(one for one in definition["spec"]["versions"] if one["name"] == "v1")
    schema = json.loads(json.dumps(version["schema"]["openAPIV3Schema"]))
    _close(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def _close(schema: Any) -> None:
    if isinstance(schema, list):
        for one in schema:
            _close(one)
    if not isinstance(schema, dict):
        return
    for one in schema.values():
        _close(one)
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        if "pattern" in schema:  # of texts alone
            schema["anyOf"][1]["pattern"] = schema.pop("pattern")
    open_map = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and "properties" in schema and not open_map:
        schema["additionalProperties"] = False


def without_chance(text: str) -> str:
    """A made token is another one each time."""
    return re.sub(r"(auth_token: ).*", r"\1MADE", text)
