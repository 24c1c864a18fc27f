"""The file of keys: what it may say, that it is read again, and what a header must have."""

import base64
import json
import os
import time

import pytest
import yaml
from typer.testing import CliRunner

from tercet.cluster import keys_cli
from tercet.cluster.cli import app
from tercet.errors import SpecError, Unauthenticated
from tercet.roles.gateway.keys import KeyRing, by_digest, digest, read_keys
from tercet.watched import LOOK_EVERY_S

GOOD = {"name": "team-a", "sha256": digest(b"secret")}


def write(path, keys):
    part = path.with_suffix(".part")
    part.write_text(keys if isinstance(keys, str) else yaml.safe_dump({"keys": keys}))
    part.replace(path)


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "keys.yaml", [GOOD])
    return tmp_path / "keys.yaml"


def test_a_key_is_known_by_its_digest(file):
    ring = KeyRing(str(file))
    for header in (b"Bearer secret", b"bearer secret", b"BEARER   secret  "):
        assert ring.owner(header).name == "team-a"


BASIC = b"Basic " + base64.b64encode(b"anybody:secret")


@pytest.mark.parametrize(
    "header",
    [b"", b"secret", b"Bearer", b"Bearer ", b"Bearer Secret", b"Bearer secret2", b"Digest secret", BASIC,
     b"Bearer " + digest(b"secret").encode(), b"Bearer \xff\xfe", b"Bearer secret\x00"],
)  # fmt: skip
def test_whoever_has_none_is_refused(file, header):
    with pytest.raises(Unauthenticated):
        KeyRing(str(file)).owner(header)


def test_a_page_may_give_it_as_a_password(file):
    ring = KeyRing(str(file))
    assert ring.owner(BASIC, from_page=True).name == "team-a"
    for bad in (
        b"Basic",
        b"Basic !!!",
        b"Basic " + base64.b64encode(b"secret"),
        b"Basic " + base64.b64encode(b"secret:"),
    ):
        with pytest.raises(Unauthenticated):
            ring.owner(bad, from_page=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("keys: [", "is no YAML"),
        ("keys: [{name: 2026-02-30}]", "is no YAML: ValueError"),
        ("keys: " + "[" * 5000, "is no YAML|keys"),
        ("- 1", "valid dictionary"),
        ("keyz: []", "keyz"),
        ([{"name": "a"}], "keys.0.sha256: Field required"),
        ([{"name": "a", "sha256": "secret"}], "keys.0.sha256"),
        ([{**GOOD, "sha256": GOOD["sha256"].upper()}], "keys.0.sha256"),
        ([{**GOOD, "name": "Team A"}], "keys.0.name"),
        ([{**GOOD, "tokens_per_minute": 0}], "keys.0.tokens_per_minute"),
        ([{**GOOD, "concurrent": "4"}], "keys.0.concurrent"),
        ([{**GOOD, "rpm": 4}], "keys.0.rpm"),
        ([GOOD, GOOD], "team-a is there twice"),
        ([GOOD, {**GOOD, "name": "b"}], "is there twice"),
        ("x" * (2 << 20), "more than"),
    ],
)
def test_a_faulty_file_is_refused_by_what_is_wrong(tmp_path, text, says):
    path = tmp_path / "keys.yaml"
    write(path, text)
    with pytest.raises(SpecError, match=says) as refused:
        KeyRing(str(path))
    assert str(path) in str(refused.value)
    assert "secret" not in str(refused.value).replace(GOOD["sha256"], "")  # a key that stands there by mistake


@pytest.mark.parametrize("opened", ["[", "{a: ", "- ", "? ", "[{a: ["])
def test_what_is_nested_ends_nobody(tmp_path, opened):
    path = tmp_path / "keys.yaml"
    path.write_text((opened * 1_000_000)[:1_000_000])
    with pytest.raises(SpecError, match=r"nested too deeply|is no YAML"):
        KeyRing(str(path))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        KeyRing(str(tmp_path / "none.yaml"))


def test_an_empty_file_lets_nobody_in(tmp_path):
    write(tmp_path / "keys.yaml", "")
    with pytest.raises(Unauthenticated):
        KeyRing(str(tmp_path / "keys.yaml")).owner(b"Bearer secret")


def soon(check):
    deadline = time.monotonic() + 10 * LOOK_EVERY_S
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def knows(ring, key):
    try:
        ring.owner(b"Bearer " + key)
    except Unauthenticated:
        return False
    return True


def test_it_is_read_again_when_it_changes_and_kept_when_it_is_broken(file, caplog):
    ring = KeyRing(str(file))
    write(file, [{"name": "b", "sha256": digest(b"other")}])
    soon(lambda: knows(ring, b"other"))
    assert not knows(ring, b"secret")
    write(file, "keys: [")
    soon(lambda: knows(ring, b"other") and "is no YAML" in caplog.text)
    time.sleep(1.5 * LOOK_EVERY_S)
    assert knows(ring, b"other")
    assert caplog.text.count("is no YAML") == 1  # not each second
    file.unlink()
    soon(lambda: knows(ring, b"other") and "cannot be read" in caplog.text)
    assert knows(ring, b"other")
    write(file, [GOOD])
    soon(lambda: knows(ring, b"secret"))


def test_behind_a_link_that_is_moved_as_kubernetes_does(tmp_path):
    for name, key in (("one", b"secret"), ("two", b"other")):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "keys.yaml", [{"name": "a", "sha256": digest(key)}])
    os.symlink("one", tmp_path / "data")
    os.symlink("data/keys.yaml", tmp_path / "keys.yaml")
    ring = KeyRing(str(tmp_path / "keys.yaml"))
    assert knows(ring, b"secret")
    os.symlink("two", tmp_path / "new")
    os.replace(tmp_path / "new", tmp_path / "data")
    soon(lambda: knows(ring, b"other"))
    assert not knows(ring, b"secret")


def run(*words):
    return CliRunner().invoke(app, ["keys", *map(str, words)])


def test_the_command_draws_lists_and_removes(tmp_path):
    path = tmp_path / "keys.yaml"
    first = run("add", path, "team-a", "--requests-per-minute", 600, "--concurrent", 4)
    second = run("add", path, "team-b")
    assert (first.exit_code, second.exit_code) == (0, 0)
    keys = [result.stdout.strip().splitlines()[0] for result in (first, second)]
    assert len({*keys}) == 2
    assert all(key.startswith("tercet-") and len(key) > 40 for key in keys)
    text = path.read_text()
    assert not any(key in text for key in keys)
    assert path.stat().st_mode & 0o077 == 0
    ring = KeyRing(str(path))
    assert [ring.owner(f"Bearer {key}".encode()).name for key in keys] == ["team-a", "team-b"]
    shown = json.loads(run("list", path, "--json").stdout)
    assert [(each["name"], each["requests_per_minute"], each["concurrent"]) for each in shown] == [
        ("team-a", 600, 4), ("team-b", None, None)
    ]  # fmt: skip
    assert "team-a" in run("list", path).stdout
    removed = run("remove", path, "team-a")
    assert removed.exit_code == 0
    assert "the key of team-a is removed" in removed.stderr
    assert [key.name for key in read_keys(path)] == ["team-b"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("add", "{}", "team-a"), "team-a has a key already; remove it first"),
        (("add", "{}", "Team"), "name: "),
        (("add", "{}", "b", "--concurrent", "0"), "concurrent: "),
        (("remove", "{}", "b"), "there is no key of b"),
        (("list", "{}.none"), "cannot be read"),
    ],
)
def test_the_command_says_what_is_wrong(file, words, says):
    before = file.read_bytes()
    result = run(*(word.format(file) for word in words))
    assert result.exit_code != 0
    assert says in str(result.exception)
    assert file.read_bytes() == before


def test_no_file_is_written_that_nothing_reads(file, monkeypatch):
    monkeypatch.setattr(keys_cli, "MOST_BYTES", file.stat().st_size + 50)
    before = file.read_bytes()
    result = run("add", file, "team-b")
    assert isinstance(result.exception, SpecError)
    assert "more than" in str(result.exception)
    assert result.stdout == ""  # no key that nothing knows
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_many_keys_are_read_in_no_time():
    keys = [{"name": f"n{i}", "sha256": digest(str(i).encode())} for i in range(20_000)]
    from tercet.roles.gateway.keys import KeyFile

    assert len(by_digest(KeyFile.model_validate({"keys": keys}).keys, "x")) == 20_000
