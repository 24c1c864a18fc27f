"""Every pod of every case: what it may do, what it is reached by, and what Ray makes of its command."""

from __future__ import annotations

import copy
import json
import re
import shlex

import pytest
from ray.scripts.scripts import start

from tests.deploy import charts
from tests.deploy.charts import (
    CASES,
    PLAIN,
    WITH_KUBERAY,
    component,
    container,
    containers_of,
    head_of,
    of_kind,
    pods_of,
    rendered,
    spec_of,
)


@pytest.mark.parametrize("case", CASES)
def test_a_container_may_do_little(case):
    for where, pod, one in containers_of(rendered(case)):
        assert faults(pod["spec"], one) == [], where


def faults(spec, one):
    """What a container could do that it need not."""
    security, rest = one["securityContext"], spec["securityContext"]
    right = {
        "not root": rest["runAsNonRoot"] is True and rest["runAsUser"] > 0,
        "seccomp": rest["seccompProfile"] == {"type": "RuntimeDefault"},
        "no token of Kubernetes": spec["automountServiceAccountToken"] is False,
        "its own processes": not (spec.get("hostPID") or spec.get("hostIPC") or spec.get("shareProcessNamespace")),
        "read-only root": security["readOnlyRootFilesystem"] is True,
        "no more rights later": security["allowPrivilegeEscalation"] is False and "privileged" not in security,
        "no capabilities": security["capabilities"]["drop"] == ["ALL"],
        "but one": set(security["capabilities"].get("add", [])) <= {"IPC_LOCK"},
        "limits": {"cpu", "memory"} <= one["resources"]["limits"].keys(),
        "an image of a version": re.search(r":[\w.-]+$|@sha256:", one["image"])
        and not one["image"].endswith(":latest"),
        "no folder of the host": not any("hostPath" in volume for volume in spec["volumes"]),
    }
    return [name for name, holds in right.items() if not holds]


def test_a_container_that_may_do_more_is_found():
    head = copy.deepcopy(head_of(rendered("kuberay")))
    ray = container(head, "ray-head")
    ray["securityContext"] = {"privileged": True, "readOnlyRootFilesystem": False, "capabilities": {"drop": []}}
    ray["securityContext"]["allowPrivilegeEscalation"] = True
    ray["resources"]["limits"] = {"cpu": 1}
    ray["image"] = "tercet:latest"
    head["spec"].update(hostPID=True, automountServiceAccountToken=True, securityContext={"runAsNonRoot": False})
    head["spec"]["securityContext"]["seccompProfile"] = {"type": "Unconfined"}
    head["spec"]["volumes"].append({"name": "host", "hostPath": {"path": "/"}})
    assert len(faults(head["spec"], ray)) == 10


@pytest.mark.parametrize("case", CASES)
def test_what_a_container_mounts_is_there(case):
    for _, pod, one in containers_of(rendered(case)):
        check_mounts(pod, one)


def check_mounts(pod, one):
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    paths = [mount["mountPath"] for mount in one["volumeMounts"]]
    assert len(set(paths)) == len(paths)
    assert "/tmp" in paths or component(pod) == "test"  # Ray, Python and our run files write there
    for mount in one["volumeMounts"]:
        volume = volumes[mount["name"]]
        assert "subPath" not in mount  # what is mounted so never changes
        assert mount.get("readOnly", False) == ("emptyDir" not in volume and mount["name"] != "huggingface")
        if "emptyDir" in volume:
            assert "sizeLimit" in volume["emptyDir"]


@pytest.mark.parametrize("case", CASES)
def test_only_the_gateways_pod_has_the_gateways_secrets(case):
    for _, pod in pods_of(rendered(case)):
        names = {volume["name"] for volume in pod["spec"]["volumes"]}
        if component(pod) != "head":
            assert not names & {"api-keys", "gateway-tls"}


def test_rdma_locks_memory_and_nobody_else_does():
    for case in CASES:
        for _, pod in pods_of(rendered(case)):
            for one in pod["spec"]["containers"]:
                wants = any(name.startswith("rdma/") for name in one["resources"]["limits"])
                assert ("IPC_LOCK" in one["securityContext"]["capabilities"].get("add", [])) is wants
    assert any(component(pod) == "pool-prefill" for _, pod in pods_of(rendered("gpus")))


@pytest.mark.parametrize("case", CASES)
def test_a_service_finds_its_pods_and_their_ports(case):
    manifests = rendered(case)
    head = head_of(manifests)
    ports = {port["name"]: port["containerPort"] for port in container(head, "ray-head")["ports"]}
    for service in of_kind(manifests, "Service"):
        assert service["spec"]["selector"].items() <= head["metadata"]["labels"].items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()
        assert all(len(name) <= 15 for name in ports)
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"].items()
        assert sum(selector <= pod["metadata"]["labels"].items() for _, pod in pods_of(manifests)) == 1
    spec = spec_of(manifests)
    assert (ports["http"], ports["grpc"]) == (spec["gateway"]["http"]["port"], spec["gateway"]["grpc"]["port"])


@pytest.mark.parametrize("case", WITH_KUBERAY)
def test_no_pod_has_the_name_that_kuberay_gives(case):
    """KubeRay's head Service selects by app.kubernetes.io/name: kuberay, which a pod's own label would take away."""
    for _, pod in pods_of(rendered(case)):
        assert not pod["metadata"]["labels"].keys() & {"app.kubernetes.io/name", "app.kubernetes.io/created-by"}


@pytest.mark.parametrize("case", CASES)
def test_ray_nodes_join_before_anything_is_ready(case):
    """Clients wait until /ready; Ray nodes must not, since /ready waits for them."""
    manifests = rendered(case)
    services = {service["metadata"]["name"]: service["spec"] for service in of_kind(manifests, "Service")}
    full = spec_of(manifests)["name"]
    assert "publishNotReadyAddresses" not in services[full]
    if case in PLAIN:
        assert services[f"{full}-head"]["publishNotReadyAddresses"] is True
        commands = [container(p, "ray-worker")["args"] for _, p in pods_of(manifests) if "pool" in component(p)]
        assert all(f"--address={full}-head:6379" in command for command in commands)


@pytest.mark.parametrize("case", CASES)
def test_who_is_asked_whether_it_is_ready(case):
    manifests = rendered(case)
    head, spec = head_of(manifests), spec_of(manifests)
    ray = container(head, "ray-head")
    assert "gcs_healthz" in json.dumps(ray["livenessProbe"])  # Ray is not restarted because a model still loads
    assert "gcs_healthz" in json.dumps(ray["readinessProbe"])
    if of_kind(manifests, "RayJob"):  # it is submitted once all pods are ready
        assert [one["name"] for one in head["spec"]["containers"]] == ["ray-head"]
        return
    serve = container(head, "serve")
    assert "/ready" in json.dumps(serve["readinessProbe"])
    assert "/health" in json.dumps(serve["livenessProbe"])
    for probe in (serve["startupProbe"], serve["livenessProbe"]):  # a model may load as long as the spec lets it
        assert "/health" in json.dumps(probe)
        assert probe["periodSeconds"] * probe["failureThreshold"] >= spec["ray"]["start_timeout_s"]
    drain = spec.get("limits", {}).get("drain_timeout_s", 20)
    assert head["spec"]["terminationGracePeriodSeconds"] > drain
    assert int(serve["command"][-1]) > drain


def test_a_model_has_45_minutes_by_default():
    assert spec_of(rendered("kuberay"))["ray"]["start_timeout_s"] == 45 * 60


@pytest.mark.parametrize("case", PLAIN)
def test_ray_takes_the_commands_of_pods(case):
    for _, pod in pods_of(rendered(case)):
        for one in pod["spec"]["containers"]:
            if one["name"].startswith("ray-"):
                assert one["command"] == ["tini", "--"]
                assert one["args"][:2] == ["ray", "start"]
                start.make_context("ray start", one["args"][2:])  # raises click's error of an option that is not


@pytest.mark.parametrize("case", WITH_KUBERAY)
def test_ray_takes_what_kuberay_makes_of_its_parameters(case):
    (cluster,) = of_kind(rendered(case), "RayCluster")
    assert "command" not in container(cluster["spec"]["headGroupSpec"]["template"], "ray-head")
    for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        line = " ".join(f"--{name}={value}" for name, value in group["rayStartParams"].items())
        start.make_context("ray start", shlex.split(line))
        assert "labels" not in group["rayStartParams"]  # KubeRay refuses it beside the group's own


def test_npus_are_rays():
    for mode in ("plain", "kuberay"):
        values = str(charts.HERE / "cases" / "npus.yaml")
        manifests = charts.parsed(charts.template("-f", values, "--set", f"ray.mode={mode}"))
        if mode == "plain":
            pod = next(pod for _, pod in pods_of(manifests) if component(pod) == "pool-ascend")
            words = container(pod, "ray-worker")["args"][2:]
        else:
            (cluster,) = of_kind(manifests, "RayCluster")
            words = shlex.split(f"--resources={cluster['spec']['workerGroupSpecs'][0]['rayStartParams']['resources']}")
        given = start.make_context("ray start", words).params["resources"]
        assert json.loads(given) == {"NPU": 8}


@pytest.mark.parametrize("case", CASES)
def test_everyone_shows_ray_the_same_token(case):
    manifests = rendered(case)
    secrets = set()
    for _, pod in pods_of(manifests):
        for one in pod["spec"]["containers"]:
            env = {entry["name"]: entry.get("value") for entry in one.get("env", [])}
            if component(pod) != "test":
                assert (env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN_PATH"]) == ("token", "/etc/ray-token/auth_token")
        secrets |= {v["secret"]["secretName"] for v in pod["spec"]["volumes"] if v["name"] == "ray-token"}
    for cluster in of_kind(manifests, "RayCluster"):
        secrets.add(cluster["spec"]["authOptions"]["secretName"])
    assert len(secrets) == 1
    for secret in of_kind(manifests, "Secret"):
        assert {secret["metadata"]["name"]} == secrets
        assert secret["data"].keys() == {"auth_token"}  # the key that KubeRay reads


@pytest.mark.parametrize("case", CASES)
def test_nobody_may_ask_kubernetes_anything(case):
    kinds = {manifest["kind"] for manifest in rendered(case)}
    assert not kinds & {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}
    for account in of_kind(rendered(case), "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
