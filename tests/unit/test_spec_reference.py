"""docs/spec.md says what the code says, and has every key."""

import subprocess
import sys
from pathlib import Path

from tercet.spec import Frozen

ROOT = Path(__file__).parents[2]


def test_it_is_what_the_code_says():
    command = [sys.executable, "docs/make_spec.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_every_key_is_there():
    text = (ROOT / "docs/spec.md").read_text()
    keys = {key for model in Frozen.__subclasses__() for key in model.model_fields}
    assert {key for key in keys if f"| `{key}` |" not in text} == set()
