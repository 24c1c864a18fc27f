"""A wrong spec is one line that names file, line, path and the bad value."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.cluster.spec_file import load_spec
from tercet.core import Role
from tercet.errors import SpecError, UnsupportedSpec
from tercet.spec import Frozen

LOCAL = Path(__file__).parents[2] / "configs" / "local.yaml"
SPEC = """\
name: small
pools:
  cpu: {accelerator: cpu, cpus: 4}
roles:
  prefill:
    pool: cpu
  decode:
    pool: cpu
    replicas: 2
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "spec.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def fault(path: Path, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_shipped_specs_are_valid():
    for path in LOCAL.parent.glob("*.yaml"):
        load_spec(path)


@pytest.mark.parametrize(
    ("old", "new", "want"),
    [
        ("replicas: 2", "replicas: 0", ":9: roles.decode.replicas: must be at least 1, got 0"),
        ("replicas: 2", "replicas: two", ':9: roles.decode.replicas: must be a whole number, got "two"'),
        ("replicas: 2", "replicas: 1.5", ":9: roles.decode.replicas: must be a whole number, got 1.5"),
        ("replicas: 2", "replica: 2", ":9: roles.decode.replica: unknown key; did you mean replicas?"),
        ("replicas: 2", "replicas: 9", ":5: roles.prefill.cpus: pool 'cpu' has 4 cpus, its roles need 10"),
        ("replicas: 2", "replicas: 2\n    replicas: 3", ":10: roles.decode.replicas: this key stands twice"),
        ("replicas: 2", "gpus: 1", ":9: roles.decode.gpus: pool 'cpu' has 0 gpus, its roles need 1"),
        (
            "replicas: 2",
            "kv: {blocks: 8}",
            ":9: roles.decode.kv.blocks: 8 blocks of 16 tokens cannot hold",
        ),
        ("name: small", "name: Small!", ":1: name: must be lower-case"),
        ("name: small", "model: {dtype: int3}", ":1: model.dtype: must be 'float32', 'bfloat16' or 'gguf', got"),
        ("name: small", "model: null", ":1: model: must be a map of keys, got null"),
        ("name: small", "limits: {request_timeout_s: .nan}", ":1: limits.request_timeout_s: must be "),
        ("name: small", "name: !!python/object:os.system x", ":1: name: the tag tag:yaml.org,2002:python/object"),
        ("  decode:\n    pool: cpu\n    replicas: 2\n", "", ":4: roles: topology pd needs decode"),
        ("  decode:", "  aggregated:", ":4: roles: topology pd needs decode"),
        ("  decode:", "  decoder:", ":7: roles.decoder: must be 'encode', 'prefill', 'decode' or 'aggregated'"),
        ("roles:", "roles: [", ":6: not valid YAML"),
    ],
)
def test_one_line_names_place_and_value(tmp_path, old, new, want):
    path = write(tmp_path, SPEC.replace(old, new, 1))
    assert f"{path}{want}" in fault(path)


def test_several_faults_are_a_line_each_in_the_order_of_the_file(tmp_path):
    text = SPEC.replace("name: small", "name: Small!").replace("replicas: 2", "replicas: 0\n    pol: x")
    path = write(tmp_path, "topologie: pd\n" + text)
    with pytest.raises(SpecError) as caught:
        load_spec(path, ["model.dtype=int3"])
    starts = [f"{path}:1: topologie: unknown key", f"{path}:2: name: must", f"{path}:10: roles.decode.replicas: must"]
    starts += [f"{path}:11: roles.decode.pol: unknown key", "--set model.dtype=int3: model.dtype: must be"]
    lines = str(caught.value).splitlines()
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", ":1: the spec must be a map of keys, got a list"),
        (b"name: x\nmodel: \xff\n", ":2: not valid UTF-8 at byte 15"),
        ("a: &x [*x]\n", "levels"),
        ("a: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_spec(tmp_path, content, want):
    assert want in fault(write(tmp_path, content))


def test_missing_file_and_folder(tmp_path):
    assert "no such file" in fault(tmp_path / "none.yaml")
    assert "cannot be read" in fault(tmp_path)


NO_SIZES = "must be auto, off or a list of batch sizes, such as [1, 2, 4], got"


@pytest.mark.parametrize(
    ("setting", "want"),
    [
        ("roles.decode.cuda_graphs=8", f"roles.decode.cuda_graphs: {NO_SIZES} 8"),
        ("roles.decode.cuda_graphs=[]", f"roles.decode.cuda_graphs: {NO_SIZES} []"),
        ("roles.decode.cuda_graphs=[0]", f"roles.decode.cuda_graphs: {NO_SIZES} [0]"),
        ("roles.decode.cuda_graphs=[true]", f"roles.decode.cuda_graphs: {NO_SIZES} [true]"),
        ("roles.decode.cuda_graphs=on", f"roles.decode.cuda_graphs: {NO_SIZES} true"),
        ("roles.decode.cuda_graphs=[1,64]", "roles.decode.cuda_graphs: no batch has 64 sequences"),
        ("roles.prefill.cpu_affinity=[0,0]", "roles.prefill.cpu_affinity: [0, 0] is not a list of different cores"),
    ],
)
def test_a_fault_within_a_role_names_the_role_in_one_line(tmp_path, setting, want):
    told = fault(write(tmp_path, SPEC), setting)
    assert want in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(("given", "got"), [("auto", "auto"), ("off", "off"), ("[2,1]", [2, 1])])
def test_graphs_are_captured_as_set(tmp_path, given, got):
    path = write(tmp_path, SPEC.replace("accelerator: cpu, cpus: 4", "accelerator: gpu, gpus: 3"))
    settings = ["roles.prefill.gpus=1", "roles.decode.gpus=1", f"roles.decode.cuda_graphs={given}"]
    assert load_spec(path, settings).roles[Role.DECODE].cuda_graphs == got
    in_yaml = path.read_text().replace("replicas: 2", f"replicas: 2\n    gpus: 1\n    cuda_graphs: {given}")
    path.write_text(in_yaml)
    assert load_spec(path, ["roles.prefill.gpus=1"]).roles[Role.DECODE].cuda_graphs == got


@pytest.mark.parametrize(
    ("setting", "want"),
    [
        ("roles.decode.scheduler.max_waiting=4", "roles.decode.scheduler.max_waiting: has no effect"),
        ("roles.prefill.cuda_graphs=[1]", "roles.prefill.cuda_graphs: has no effect, since a prefill worker decodes"),
        ("pools.cpu.gpus=8", "pools.cpu.gpus: has no effect in a pool whose accelerator is cpu"),
        ("pools.cpu.npus=8", "pools.cpu.npus: has no effect in a pool whose accelerator is cpu; use 0"),
        ("roles.decode.kernels=triton", "roles.decode.kernels: triton ones are for GPUs, and pool cpu has CPUs"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, setting, want):
    path = write(tmp_path, SPEC)
    assert f"--set {setting}: {want}" in fault(path, setting)
    with pytest.raises(UnsupportedSpec):
        load_spec(path, [setting])


def test_encode_and_accelerators_are_refused_with_their_line(tmp_path):
    with_encode = SPEC + "  encode:\n    pool: cpu\n    kv: {blocks: 256}\ntopology: epd\n"
    assert "roles.encode.kv: has no effect" in fault(write(tmp_path, with_encode))
    with_encode = SPEC + "  encode:\n    pool: cpu\n    images: {blocks: 8}\ntopology: epd\n"
    assert "roles.encode.images.blocks: 8 blocks of 16 tokens cannot hold" in fault(write(tmp_path, with_encode))
    with_gpus = SPEC.replace("cpus: 4", "gpus: 2").replace("replicas: 2", "gpus: 2")
    assert ":9: roles.decode.gpus: has no effect in a pool whose accel" in fault(write(tmp_path, with_gpus))
    for_npus = SPEC.replace("accelerator: cpu, cpus: 4", "accelerator: npu, npus: 2")
    assert ":5: roles.prefill.npus: a rank of this pool runs on one NPU, got 0" in fault(write(tmp_path, for_npus))
    without = SPEC.replace("accelerator: cpu, cpus: 4", "accelerator: gpu, gpus: 2")
    assert ":5: roles.prefill.gpus: a rank of this pool runs on one GPU, got 0" in fault(write(tmp_path, without))


def test_every_key_is_read_somewhere():
    """By its name, or by what refuses it by name: a key that nobody reads has no effect."""
    read: set[str] = set()
    for path in (LOCAL.parents[1] / "tercet").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.parent.name != "spec" else ():
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif path.name == "unbuilt.py" and isinstance(node, ast.Constant):
                read.add(str(node.value))
    assert {
        f"{model.__name__}.{key}" for model in Frozen.__subclasses__() for key in model.model_fields.keys() - read
    } == set()


def test_set_overrides_as_helm_does():
    spec = load_spec(
        LOCAL,
        [
            "model.dtype=float32",
            "gateway.http.port=18000",
            "topology=aggregated",
            "roles.prefill=null",
            "roles.decode=null",
            "roles.aggregated={pool: cpu, replicas: 2}",
            r"pools.cpu.labels.tercet\.io/pool=a",
        ],
    )
    assert (spec.model.dtype, spec.gateway.http.port) == ("float32", 18000)
    assert list(spec.roles) == [Role.AGGREGATED]
    assert spec.pools["cpu"].labels == {"tercet.io/pool": "a"}


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("gateway.http.host=::", lambda s: s.gateway.http.host == "::"),
        ("gateway.http.host=[::1]", lambda s: s.gateway.http.host == "::1"),
        ("gateway.http.host=0.0.0.0", lambda s: s.gateway.http.host == "0.0.0.0"),
        ("ray.address=[::1]:6379", lambda s: s.ray.address == "[::1]:6379"),
        ("name=1234", lambda s: s.name == "1234"),
        ("model.served_name=no", lambda s: s.model.served_name == "no"),
        ("model.served_name=1.5", lambda s: s.model.served_name == "1.5"),
        ("model.served_name=a: b #c", lambda s: s.model.served_name == "a: b #c"),
        ("model.served_name='no'", lambda s: s.model.served_name == "no"),
        ("model.served_name=null", lambda s: s.model.served_name is None),
        ("pools.cpu.labels.zone=true", lambda s: s.pools["cpu"].labels == {"zone": "true"}),
        ("limits.request_timeout_s=1e3", lambda s: s.limits.request_timeout_s == 1000),
        ("limits.min_body_rate=2e6", lambda s: s.limits.min_body_rate == 2_000_000),
        ('gateway.cors_origins=["*"]', lambda s: s.gateway.cors_origins == ["*"]),
    ],
)
def test_a_text_is_taken_as_it_stands_and_a_number_as_it_is_written(setting, read):
    assert read(load_spec(LOCAL, [setting]))


@pytest.mark.parametrize(
    ("setting", "want"),
    [
        ("modle.dtype=float32", "--set modle.dtype=float32: modle: unknown key; did you mean model?"),
        ("name", "--set name: want key.path=value"),
        ("a..b=1", "--set a..b=1: want key.path=value"),
        ("model=[1", "--set model=[1: not valid YAML"),
        ("name.x=1", "--set name.x=1: name is 'local', it has no keys below it"),
        ("gateway.grpc.port=8000", "--set gateway.grpc.port=8000: gateway.grpc.port: 8000 is taken by gateway.http"),
        ("gateway.cors_origins=*", "a text with signs of YAML needs quotes"),
        ("gateway.cors_origins=x", "gateway.cors_origins: must be a list"),
        ("model.source=", 'model.source: must not be empty, got ""'),
        ("gateway.http.host=", 'gateway.http.host: must not be empty, got ""'),
        ("limits.max_body_bytes=99999999999999999999", "limits.max_body_bytes: must be at most"),
        (
            "tracing.otlp_endpoint=collector:4317",
            "tracing.otlp_endpoint: must be http://HOST:PORT or https://HOST:PORT",
        ),
        ("tracing.otlp_endpoint=http://collector", "tracing.otlp_endpoint: must be http://HOST:PORT"),
        ("tracing.otlp_endpoint=http://me@collector:4317/v1", "tracing.otlp_endpoint: must be http://HOST:PORT"),
        ("tracing.sample_ratio=2", "tracing.sample_ratio: must be at most 1"),
        ("logging.format=xml", "logging.format"),
        ("gateway.http.port=70000", "gateway.http.port: must be at most 65535, got 70000"),
    ],
)
def test_a_wrong_override_names_itself(setting, want):
    assert want in fault(LOCAL, setting)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_any_override_ends_in_a_spec_or_a_spec_error(text):
    with contextlib.suppress(SpecError):
        load_spec(LOCAL, [text])


@pytest.mark.parametrize(
    ("roles", "told"),
    [
        ("  decode: {pool: cpu, images: {blocks: 512}}\n  encode: {pool: cpu}\n", "roles.decode.images: has no effect"),
        (
            "  decode: {pool: cpu}\n  encode: {pool: cpu, scheduler: {token_budget: 7}}\n",
            "roles.encode.scheduler.token_budget: has no effect",
        ),
    ],
)
def test_what_means_nothing_for_images_is_refused(tmp_path, roles, told):
    text = f"topology: epd\npools:\n  cpu: {{accelerator: cpu}}\nroles:\n  prefill: {{pool: cpu}}\n{roles}"
    assert told in fault(write(tmp_path, text))
