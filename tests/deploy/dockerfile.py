"""deploy/Dockerfile, stage by stage; and its steps, run in a copy-on-write copy of this machine's root."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

from tests.deploy.tools import ROOT

PATH = ROOT / "deploy" / "Dockerfile"


@dataclass
class Stage:
    name: str
    parent: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # instruction, its value


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    parser = DockerfileParser(fileobj=io.BytesIO(PATH.read_bytes()))
    for step in parser.structure:
        kind, value = step["instruction"], step["value"]
        if kind == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", value).groups()
            found[name] = Stage(name, parent)
        elif found and kind != "COMMENT":
            found[[*found][-1]].steps.append((kind, value))
    return found


def chain(target: str) -> list[Stage]:
    """What a target is made of: its parents, and the stages that it copies from, each once and in order."""
    known = stages()
    made: list[Stage] = []

    def visit(name: str) -> None:
        stage = known[name]
        copied = [re.search(r"--from=(\S+)", value) for kind, value in stage.steps if kind == "COPY"]
        for other in [stage.parent, *(match[1] for match in copied if match)]:
            if other in known:
                visit(other)
        if stage not in made:
            made.append(stage)

    visit(target)
    return made


def script(target: str) -> Iterator[str]:
    """The steps as lines for bash, run as root in the image's root. The build context is at /context."""
    for stage in chain(target):
        yield f"echo '=== stage {stage.name}'; cd /"
        for kind, value in stage.steps:
            match kind:
                case "RUN":
                    yield value
                case "ENV":
                    yield f"export {value}"
                case "ARG":
                    yield f"export {value}"
                case "WORKDIR":
                    yield f"mkdir -p {value}; cd {value}"
                case "COPY":
                    yield from copies(shlex.split(value))
                case "SHELL" | "EXPOSE" | "ENTRYPOINT" | "CMD" | "USER":
                    continue
                case other:
                    raise AssertionError(f"the test cannot run {other}")


def copies(words: list[str]) -> Iterator[str]:
    """One root stands for all stages, so what comes from another one is there already."""
    if words[0].startswith("--from="):
        assert words[1] == words[2], "from another stage only to the same path"
        yield f"test -e {words[1]}"
        return
    *sources, target = words
    for source in sources:  # a folder's contents are copied, as COPY does
        yield f"mkdir -p {target if target.endswith('/') else os.path.dirname(target) or '.'}"
        yield f"test -d /context/{source} && cp -r /context/{source}/. {target}/ || cp /context/{source} {target}"


ENTER = """
set -euo pipefail
mount --make-rprivate /
cd "$IMAGE"
mkdir -p upper work root
mount -t overlay overlay -o "lowerdir=/,upperdir=$IMAGE/upper,workdir=$IMAGE/work" root
mount -t proc proc root/proc
mount --rbind /dev root/dev
mount --rbind /sys root/sys
ln -sf /usr/bin/python3 root/usr/local/bin/python  # which the base image has
"""
BARE = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def in_image(
    image: Path, inside: str, before: str, seconds: float, *isolation: str
) -> subprocess.CompletedProcess[str]:
    """Run lines of bash in the root that `image` holds the changes of. `before` runs outside, once it is mounted.

    What is mounted, and what runs, ends with it.
    """
    outside = f'{ENTER}\n{before}\nexec chroot root bash -eo pipefail -c "$INSIDE"'
    return subprocess.run(
        ["unshare", "--mount", "--pid", *isolation, "--fork", "--kill-child", "bash", "-c", outside],
        env={**os.environ, "IMAGE": str(image), "INSIDE": inside, "PATH": BARE},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
