"""`tercet experts import`: counts that another program has recorded become a file that `solve` works on."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tercet.cluster import foreign_counts
from tercet.cluster.cli import app
from tercet.cluster.counts_file import read_counts
from tercet.cluster.foreign_counts import Group, import_counts
from tercet.distributed.expert_map import default_map
from tercet.errors import ClusterError, SpecError
from tercet.placement.experts.weighing import served

GROUP = Group(ranks=4, nodes=2, redundancy=4, top_k=2, expert_bytes=1000)
MADE_OF = ["--ranks", "4", "--redundancy", "4", "--top-k", "2"]


def run(*args: Any):
    return CliRunner().invoke(app, ["experts", *map(str, args)])


def skewed(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(0.5, 400, shape[-2:]), shape) + 1


def saved(path: Path, counts: Any) -> Path:
    """By the suffix; numpy's arrays as what the file is made of."""
    if path.suffix == ".npy":
        np.save(path, counts)
    elif path.suffix == ".json":
        path.write_text(json.dumps(counts, default=lambda array: array.tolist()))
    else:
        torch.save({k: _tensor(v) for k, v in counts.items()} if isinstance(counts, dict) else _tensor(counts), path)
    return path


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def sglang(counts: np.ndarray) -> dict[str, Any]:
    """As its recorder dumps them in mode stat."""
    return {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}


# ---- what is read


@pytest.mark.parametrize("suffix", [".npy", ".json", ".pt", ".NPY"])
@pytest.mark.parametrize("windows", [None, 1, 3])
def test_each_kind_of_file_has_the_same_counts(tmp_path, suffix, windows):
    counts = skewed(2, 8) if windows is None else skewed(windows, 2, 8)
    source = saved(tmp_path / f"made{suffix.lower()}", counts)
    found, silent = import_counts(source.rename(tmp_path / f"made{suffix}"), GROUP, "w")
    assert found.load[:, 0].tolist() == counts.reshape(-1, 2, 8).tolist()
    assert silent == []


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_an_object_has_them_by_name(tmp_path, suffix):
    counts = skewed(3, 2, 8)
    found, _ = import_counts(saved(tmp_path / f"made{suffix}", sglang(counts)), GROUP, "w")
    assert found.load[:, 0].tolist() == counts.tolist()


@pytest.mark.parametrize("dtype", ["u1", "i4", "u8", "f2", "f4", "f8", ">i8"])
def test_any_type_of_whole_numbers_will_do(tmp_path, dtype):
    counts = np.arange(16).reshape(2, 8).astype(dtype)
    found, _ = import_counts(saved(tmp_path / "made.npy", counts), GROUP, "w")
    assert found.load.dtype == np.int64
    assert found.load[0, 0].tolist() == np.arange(16).reshape(2, 8).tolist()


@pytest.mark.parametrize("kind", ["tensor", "dict", "json"])
@pytest.mark.parametrize(("steps", "windows"), [(8, 8), (9, 8), (30, 8), (5, 5)])
def test_many_steps_are_summed_into_few_windows(tmp_path, kind, steps, windows):
    counts = skewed(steps, 2, 8).astype(np.int32)
    source = tmp_path / ("made.json" if kind == "json" else "made.pt")
    found, _ = import_counts(saved(source, counts if kind == "tensor" else sglang(counts)), GROUP, "w")
    assert len(found.load) == windows
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(steps), windows)])
    assert found.load[:, 0].cumsum(axis=0).tolist() == counts.cumsum(axis=0)[ends - 1].tolist()
    lengths = np.diff(ends, prepend=0)
    assert lengths.max() - lengths.min() <= 1


def test_windows_of_an_array_stay_as_they_are(tmp_path):
    counts = skewed(20, 2, 8)
    found, _ = import_counts(saved(tmp_path / "made.npy", counts), GROUP, "w")
    assert found.load[:, 0].tolist() == counts.tolist()


def test_steps_that_never_were_are_in_no_window(tmp_path):
    """A buffer of SGLang that is not full yet."""
    counts = np.concatenate([skewed(9, 2, 8), np.zeros((991, 2, 8), dtype=int)])
    found, _ = import_counts(saved(tmp_path / "made.pt", sglang(counts)), GROUP, "w")
    assert len(found.load) == 8
    assert found.load.any(axis=(1, 2, 3)).all()
    assert found.total == counts.sum()


def test_sums_are_exact(tmp_path):
    counts = np.full((16, 1, 8), 2.0**24 + 2, dtype=np.float32)
    found, _ = import_counts(saved(tmp_path / "made.pt", counts), GROUP, "w")
    assert set(found.load.ravel().tolist()) == {2 * (2**24 + 2)}


def test_layers_without_experts_are_left_out(tmp_path):
    counts = skewed(3, 5, 8)
    counts[:, [0, 3]] = 0
    found, silent = import_counts(saved(tmp_path / "made.npy", counts), GROUP, "w")
    assert silent == [0, 3]
    assert found.load[:, 0].tolist() == counts[:, [1, 2, 4]].tolist()


def test_experts_lie_where_a_group_starts_with_them(tmp_path):
    counts = skewed(3, 2, 8)
    found, _ = import_counts(saved(tmp_path / "made.npy", counts), GROUP, "w")
    assert found.phy2log.tolist() == default_map(8, 4, 4).phy2log.tolist() * 2
    assert found.load.shape == (3, 1, 2, 8)
    assert (found.nodes, found.top_k, found.expert_bytes, found.worker) == (2, 2, 1000, "w")
    for window in range(3):
        slots = served(found.phy2log, found.of_windows(slice(window, window + 1)))
        assert found.computed[window].tolist() == np.rint(slots.reshape(2, 4, 3).sum(axis=2)).tolist()
        assert np.abs(found.computed[window].sum(axis=1) - counts[window].sum(axis=1)).max() <= 2  # rounded


# ---- what is refused


@pytest.mark.parametrize("suffix", [".npy", ".json", ".pt"])
@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ([[1, 2], [-3, 4]], r"-3 at \[1, 0\]: counts are whole numbers"),
        ([[1, 2], [3, 4.5]], r"4.5 at \[1, 1\]: counts are whole numbers"),
        ([[[1, float("nan")]]], r"nan at \[0, 0, 1\]"),
        ([[1, float("inf")]], r"inf at \[0, 1\]"),
        ([[0, 0], [0, 0]], "0 rows in all: nothing was counted"),
        ([[[0, 0]], [[0, 0]]], "0 rows in all"),
        ([[2**53, 2**53]], "over 9.00720e.15 rows in all|over 9.0072e.15 rows in all"),
        ([[1e300, 1.0]], "rows in all"),
        ([1, 2, 3], r"it is \[3\], and must be \[layers, experts\]"),
        ([[[[1, 2]]]], r"it is \[1, 1, 1, 2\], and must be"),
        (5, r"it is \[\], and must be"),
        ([], r"it is empty: \[0\]"),
        ([[], []], r"it is empty: \[2, 0\]"),
        ([[True, False]], "its values are bool, not whole numbers"),
    ],
)
def test_what_are_no_counts_is_refused(tmp_path, suffix, counts, told):
    source = saved(tmp_path / f"made{suffix}", counts if suffix == ".json" else np.array(counts))
    with pytest.raises(SpecError, match=told) as refused:
        import_counts(source, GROUP, "w")
    assert str(refused.value).startswith(f"{source}: ")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[["a", "b"]]', "its values are <U1, not whole numbers"),
        ("[[null, 1]]", "its values are object"),
        ("[[1, 2], [3]]", "differ in length or depth"),
        ("[[1, 2], 3]", "differ in length or depth"),
        (f"[[{10**30}, 1]]", "its values are object|its values are float64|rows in all"),
        ('{"logical_count": {"0": [1]}}', "its values are object"),
        ('{"counts": [[1, 2]]}', r"keys \['counts'\], and none is logical_count$"),
        ("[[1, 2]", "damaged one .JSONDecodeError"),
        ("[" * 100_000, "damaged one .RecursionError"),
        ("", "damaged one"),
        ("\xff", "damaged one|its values"),
    ],
)
def test_text_that_has_no_counts_is_refused(tmp_path, text, told):
    (tmp_path / "made.json").write_text(text, encoding="latin-1")
    with pytest.raises(SpecError, match=told):
        import_counts(tmp_path / "made.json", GROUP, "w")


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"records": [{"forward_pass_id": 1}], "last_physical_to_logical_map": None}, "modes stat and stat_approx"),
        ({"logical_count": [[1, 2]]}, "the counts are a list, not a tensor"),
        ([1, 2], "the counts are a list, not a tensor"),
        (torch.ones(2, 2, dtype=torch.complex64), "its values are complex64"),
        (torch.ones(2, 8).to_sparse(), "damaged one"),
        (torch.ones(1, 1).expand(1 << 20, 1 << 20), "an array of 4,398,046,511,104 bytes, 1,073,741,824 at most"),
    ],
)
def test_what_torch_has_saved_and_has_no_counts_is_refused(tmp_path, found, told):
    torch.save(found, tmp_path / "made.pt")
    with pytest.raises(SpecError, match=told):
        import_counts(tmp_path / "made.pt", GROUP, "w")


class Told:
    """What unpickles to a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".json"])
def test_no_pickle_is_loaded(tmp_path, suffix):
    source, trace = tmp_path / f"made{suffix}", tmp_path / "ran"
    files = [pickle.dumps(Told(trace))]
    np.save(tmp_path / "objects.npy", np.array([[Told(trace)]], dtype=object), allow_pickle=True)
    files.append((tmp_path / "objects.npy").read_bytes())
    for new in (True, False):
        torch.save({"logical_count": Told(trace)}, tmp_path / "objects.pt", _use_new_zipfile_serialization=new)
        files.append((tmp_path / "objects.pt").read_bytes())
    for content in files:
        source.write_bytes(content)
        with pytest.raises(SpecError, match=r"no \.\w+ file that can be read, or a damaged one|several arrays"):
            import_counts(source, GROUP, "w")
        assert not trace.exists()


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_damaged_files_are_refused(tmp_path, suffix):
    """Cut off anywhere, or with bytes of other values where its description lies."""
    source = saved(tmp_path / f"made{suffix}", np.ones((2, 8), dtype=np.int64))
    whole = source.read_bytes()
    for end in range(0, len(whole), 1 + len(whole) // 50):
        source.write_bytes(whole[:end])
        with pytest.raises(SpecError, match=f"made.{suffix[1:]}: "):
            import_counts(source, GROUP, "w")
    rng = np.random.default_rng(0)
    for _ in range(100):
        changed = bytearray(whole)
        for at in rng.integers(0, len(whole), 8):
            changed[at] = rng.integers(256)
        source.write_bytes(changed)
        with contextlib.suppress(SpecError):
            import_counts(source, GROUP, "w")


def test_several_arrays_are_refused(tmp_path):
    with (tmp_path / "made.npy").open("wb") as file:
        np.savez(file, a=np.ones((2, 8)))
    with pytest.raises(SpecError, match=r"several arrays, not one: save that of the counts by numpy\.save"):
        import_counts(tmp_path / "made.npy", GROUP, "w")


@pytest.mark.parametrize(
    ("name", "bound"), [("made.npy", "MOST_BYTES"), ("made.json", "MOST_TEXT"), ("made.pt", "MOST_BYTES")]
)
def test_large_files_are_refused_before_they_are_read(tmp_path, monkeypatch, name, bound):
    source = saved(tmp_path / name, np.ones((2, 8)))
    monkeypatch.setattr(foreign_counts, bound, source.stat().st_size - 1)
    with pytest.raises(SpecError, match=r"made\.\w+: [\d,]+ bytes, [\d,]+ at most; record fewer steps, or sum them"):
        import_counts(source, GROUP, "w")


def test_what_unpacks_to_much_is_refused(tmp_path, monkeypatch):
    saved(tmp_path / "stored.pt", np.ones((4, 100, 100)))
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored, zipfile.ZipFile(tmp_path / "made.pt", "w") as packed:
        for info in stored.infolist():
            packed.writestr(info.filename, stored.read(info), zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(foreign_counts, "MOST_BYTES", 100_000)
    with pytest.raises(SpecError, match=r"it unpacks to 32\d,\d+ bytes, 100,000 at most"):
        import_counts(tmp_path / "made.pt", GROUP, "w")


def test_what_is_no_such_file_is_refused(tmp_path):
    (tmp_path / "folder.npy").mkdir()
    for name, told in (
        ("none.npy", "there is no such file"),
        ("folder.npy", "not a file"),
        ("made.csv", r"named \.npy, \.json, \.pt"),
        ("made", r"named \.npy, \.json, \.pt"),
    ):
        with pytest.raises(SpecError, match=f"{name}: .*{told}"):
            import_counts(tmp_path / name, GROUP, "w")
    with pytest.raises(ClusterError, match="cannot be used: File name too long"):
        import_counts(tmp_path / f"{'n' * 300}.npy", GROUP, "w")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--ranks", "3", "--top-k", "2"], "--redundancy 0: 8 experts on 3 ranks take 1, 4, 7 ... at most 16"),
        (["--ranks", "4", "--redundancy", "2", "--top-k", "2"], "--redundancy 2: .* take 0, 4, 8 ... at most 24"),
        (["--ranks", "4", "--redundancy", "28", "--top-k", "2"], "--redundancy 28: .* at most 24"),
        (["--ranks", "600", "--redundancy", "592", "--top-k", "2"], "--ranks 600: 1 to 512"),
        (["--ranks", "4", "--top-k", "9"], "--top-k 9: a token has 1 to 8 of 8 experts"),
        (["--ranks", "4", "--top-k", "2", "--nodes", "3"], "--nodes 3: 4 ranks do not divide"),
        (["--ranks", "4", "--top-k", "2", "--expert-bytes", 2**51], "expert_bytes 2251799813685248"),
    ],
)
def test_options_that_do_not_fit_the_counts_are_refused(tmp_path, args, told):
    source = saved(tmp_path / "made.npy", skewed(3, 2, 8))
    shown = run("import", source, tmp_path / "counts.npz", *args)
    with pytest.raises(SpecError, match=told):
        raise shown.exception
    assert not (tmp_path / "counts.npz").exists()


@pytest.mark.parametrize("bound", ["MOST_EXPERTS", "MOST_CELLS"])
def test_more_than_can_be_weighed_is_refused(tmp_path, monkeypatch, bound):
    monkeypatch.setattr(foreign_counts, bound, 7)
    with pytest.raises(SpecError, match="2 layers of 8 experts in 12 slots on 4 ranks are too many to weigh"):
        import_counts(saved(tmp_path / "made.npy", skewed(3, 2, 8)), GROUP, "w")


@pytest.mark.parametrize("missing", ["--ranks", "--top-k"])
def test_options_that_are_needed(tmp_path, missing):
    args = {"--ranks": "4", "--top-k": "2"}
    given = [each for name, value in args.items() if name != missing for each in (name, value)]
    assert run("import", saved(tmp_path / "made.npy", skewed(2, 8)), tmp_path / "counts.npz", *given).exit_code == 2


def test_files_that_cannot_be_written_are_refused(tmp_path):
    source = saved(tmp_path / "made.npy", skewed(3, 2, 8))
    for file, told in (
        (tmp_path / "none" / "a.npz", "cannot be written"),
        (tmp_path, "cannot be written"),
        (source, "is SOURCE, too"),
        (tmp_path / "." / "made.npy", "is SOURCE, too"),
    ):
        with pytest.raises(SpecError, match=told):
            raise run("import", source, file, *MADE_OF).exception
    assert np.load(source).shape == (3, 2, 8)


# ---- the command


@pytest.mark.parametrize("suffix", [".npy", ".json", ".pt"])
def test_what_was_imported_is_solved(tmp_path, suffix):
    counts = skewed(3, 3, 8)
    counts[:, 0] = 0
    source, file = saved(tmp_path / f"elsewhere{suffix}", counts), tmp_path / "counts.npz"
    shown = run("import", source, file, *MADE_OF, "--nodes", "2", "--expert-bytes", "1000")
    assert shown.exit_code == 0, shown.output
    told = f"{file}: 3 windows, 2 layers, 8 experts, {counts.sum():,} rows; left out, since they have no rows: layers 0"
    assert shown.output == f"{told}\n"
    assert read_counts(file).worker == "elsewhere"
    solved = run("solve", file, "--json")
    assert solved.exit_code == 0, solved.output
    found = json.loads(solved.stdout)
    assert np.array(found["phy2log"]).shape == (2, 12)
    assert found["before"]["busiest"] >= found["after"]["busiest"]
    assert found["before"]["busiest"] == pytest.approx(found["measured"]["busiest"], abs=2)  # rounded
    assert (found["nodes"], found["held_out"]) == (2, True)


def test_the_least_that_must_be_said(tmp_path):
    source, file = saved(tmp_path / "made.npy", skewed(2, 8)), tmp_path / "counts.npz"
    shown = run("import", source, file, "--ranks", "4", "--top-k", "2", "--worker", "worker-7")
    assert shown.output == f"{file}: 1 windows, 2 layers, 8 experts, {read_counts(file).total:,} rows\n"
    found = read_counts(file)
    assert (found.worker, found.nodes, found.expert_bytes, found.window_s) == ("worker-7", 1, 1, 0)
    assert found.phy2log.tolist() == [[*range(8)]] * 2
    assert "solved on the same one, so it flatters" in run("solve", file).output


def test_the_help_says_what_becomes_of_steps():
    told = " ".join(run("import", "--help").output.replace("│", " ").split())
    assert "summed into at most 8 windows of about as many steps each" in told
