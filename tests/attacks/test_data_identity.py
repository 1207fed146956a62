"""Attacks on the identity of the data, on what is held out, on groups, and on half a run directory."""

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from data2vec_train import checkpoints
from data2vec_train.config.check.overrides import find_faults
from data2vec_train.config.check.rules import _groups_are_told_once
from data2vec_train.data.groups import group
from data2vec_train.data.identity import CONTENT_BYTES, difference, hashes_of, identify
from data2vec_train.data.sources.files import ArraySource, FolderSource, ManifestSource
from data2vec_train.data.sources.hf import HFSource, HFStreamingSource
from data2vec_train.data.split import UNLABELLED_HELD_OUT, Split, again, choose
from data2vec_train.errors import ConfigError, DataError, SaveError
from data2vec_train.system import outputs
from data2vec_train.training.callbacks.checkpointing import FolderCheckpointIO, disk_trouble
from data2vec_train.training.records import same_data, same_outputs
from data2vec_train.training.run_directory import RunDirectory, open_run


def content(number: int, size: int = 200) -> bytes:
    return np.random.default_rng(number).bytes(size)


def make(root: Path, count: int = 20, first: int = 0) -> Path:
    for number in range(first, first + count):
        path = root / "ab"[number % 2] / f"é{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number))
    return root


def folder(root: Path, **changes) -> FolderSource:
    options = {"path": str(root), "extensions": [".png"], "class_from_folder": "auto"}
    return FolderSource(**options | changes)


def table(path: Path, **changes) -> HFSource:
    options = {"name": None, "split": "train", "column": "image", "label_column": None, "data_files": None}
    options |= {"revision": None, "cache_dir": str(path.parent / "cache"), "kind": "image"}
    return HFSource(path=str(path), **options | changes)


def shard(path: Path, first: int, count: int) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True)
    images = [{"bytes": content(number, 100 + number), "path": None} for number in range(first, first + count)]
    parquet.write_table(pyarrow.table({"image": images, "who": [f"p{i // 3}" for i in range(count)]}), path)


# ---------------------------------------------------------------------------------------------------- other data


def swap(path: Path, other: Path) -> None:
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def relink(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.png")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file is added": lambda root: make(root, 1, 100),
    "a file is removed": lambda root: (root / "a/é004.png").unlink(),
    "all files are replaced by others of the same names and sizes": lambda root: [
        path.write_bytes(content(1000 + number)) for number, path in enumerate(sorted(root.rglob("*.png")))
    ],
    "one file is replaced by one of the same size": lambda root: (root / "a/é004.png").write_bytes(content(77)),
    "one byte is appended": lambda root: (root / "a/é004.png").open("ab").write(b"x"),
    "a file is cut to nothing": lambda root: (root / "a/é004.png").write_bytes(b""),
    "a file gets another name": lambda root: (root / "a/é004.png").rename(root / "a/other.png"),
    "a file moves to another class": lambda root: (root / "a/é004.png").rename(root / "b/é004.png"),
    "a class gets another name": lambda root: (root / "a").rename(root / "c"),
    "a class goes": lambda root: shutil.rmtree(root / "b"),
    "a loose file makes the classes go": lambda root: (root / "loose.png").write_bytes(b"1"),
    "two files of one size change places": lambda root: swap(root / "a/é004.png", root / "b/é005.png"),
    "a link to nothing stands for a file": lambda root: relink(root / "a/é004.png"),
    "upper case instead of lower": lambda root: (root / "a/é004.png").rename(root / "a/É004.png"),
    "as many files, others by name": lambda root: [
        path.rename(path.with_name(f"x{path.name}")) for path in sorted(root.rglob("*.png"))
    ],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_other_data_are_refused(tmp_path, change):
    root = make(tmp_path / "data")
    run = RunDirectory(tmp_path, tmp_path / "step", None, {"identity": {"source": identify(folder(root))}})
    change(root)
    source = folder(root)
    with pytest.raises(ConfigError, match="data.source") as said:
        same_data(OmegaConf.create({"resume": "auto"}), run, {"source": source})
    assert "\n" not in str(said.value)
    changed = OmegaConf.create({"resume": "changed"})
    if source.class_names == ["a", "b"]:
        assert same_data(changed, run, {"source": source})["source"]["digest"] == identify(source)["digest"]
    else:
        with pytest.raises(ConfigError, match="other classes"):
            same_data(changed, run, {"source": source})


def nfd(root: Path) -> Path:
    for path in sorted(root.rglob("*.png")):
        path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))
    return root


def linked(root: Path) -> Path:
    link = root.with_name("link")
    link.symlink_to(root)
    return link


def touched(root: Path) -> Path:
    for path in root.rglob("*.png"):
        os.utime(path, (1, 1))
    return root


def with_others(root: Path) -> Path:
    (root / "a/notes.txt").write_text("x")
    (root / "a/.hidden.png").write_bytes(b"x")
    return root


SAME: dict[str, Callable[[Path], Path]] = {
    "the folder has moved": lambda root: root.rename(root.with_name("moved")),
    "the folder is a copy": lambda root: Path(shutil.copytree(root, root.with_name("copy"))),
    "the folder is a link": linked,
    "all times are new": touched,
    "names are in the other form of Unicode": nfd,
    "hidden files and files of other kinds are added": with_others,
    "files were made in another order": lambda root: Path(
        shutil.copytree(root, root.with_name("z"), copy_function=lambda a, b: Path(b).write_bytes(Path(a).read_bytes()))
    ),
}


@pytest.mark.parametrize("change", SAME.values(), ids=list(SAME))
def test_the_same_data_are_the_same(tmp_path, change):
    root = make(tmp_path / "data")
    first = folder(root)
    before, held_out = identify(first), choose(first.origins(), first.labels(), 0.3)
    source = folder(change(root))
    assert difference(before, identify(source), source) is None
    assert choose(source.origins(), source.labels(), 0.3) == held_out


def test_the_end_of_a_large_file_counts_though_its_size_and_beginning_are_the_same(tmp_path):
    root = make(tmp_path / "data")
    big = root / "a/big.png"
    big.write_bytes(bytes(3 * CONTENT_BYTES))
    before = identify(folder(root))
    big.write_bytes(bytes(3 * CONTENT_BYTES - 1) + b"1")
    assert "1 of 21 compared records" in difference(before, identify(folder(root)), folder(root))


def test_a_file_that_cannot_be_read_for_a_moment_is_no_other_file(tmp_path, monkeypatch):
    source = folder(make(tmp_path / "data"))
    before = identify(source)
    monkeypatch.setattr("data2vec_train.data.identity.content_hash", lambda value: None)
    assert difference(before, identify(source), source) is None


def test_a_corrected_label_in_the_metadata_counts(tmp_path):
    root = make(tmp_path / "data")
    rows = [f"{path.relative_to(root).as_posix()},{number % 2}" for number, path in enumerate(root.rglob("*.png"))]
    (root / "metadata.csv").write_text("file_name,kind\n" + "\n".join(rows))
    options = {"metadata": "auto", "label_column": "kind", "class_from_folder": False}
    before = identify(folder(root, **options))
    rows[3] = rows[3][:-1] + str(1 - int(rows[3][-1]))
    (root / "metadata.csv").write_text("file_name,kind\n" + "\n".join(rows))
    assert "1 changed" in difference(before, identify(folder(root, **options)), folder(root, **options))


def test_a_changed_row_of_an_array_counts(tmp_path):
    x, y = np.zeros((40, 4), np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y)
    before = identify(ArraySource(path=str(tmp_path / "a.npz"), split="all", held_out=0))
    x[7, 3] = 1
    np.savez(tmp_path / "a.npz", x=x, y=y)
    now = ArraySource(path=str(tmp_path / "a.npz"), split="all", held_out=0)
    assert "1 changed (such as a.npz:7)" in difference(before, identify(now), now)


def test_a_changed_transcript_beside_a_manifest_counts(tmp_path):
    make(tmp_path / "data")
    manifest = tmp_path / "train.tsv"
    files = [path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*.png")]
    manifest.write_text("\n".join([str(tmp_path / "data"), *(f"{file}\t100" for file in files)]))
    (tmp_path / "train.wrd").write_text("\n".join(["a word"] * 20))
    before = identify(ManifestSource(path=str(manifest), fields=["text"]))
    (tmp_path / "train.wrd").write_text("\n".join(["a word"] * 19 + ["b word"]))
    now = ManifestSource(path=str(manifest), fields=["text"])
    assert "1 changed" in difference(before, identify(now), now)


def test_a_shard_that_is_added_to_a_stream_counts(tmp_path):
    shard(tmp_path / "shards/a.parquet", 0, 5)
    options = {"name": None, "split": "train", "column": "image", "label_column": None, "data_files": None}
    options |= {"revision": None, "cache_dir": str(tmp_path / "cache"), "shuffle_buffer": 1}
    before = identify(HFStreamingSource(path=str(tmp_path / "shards"), **options))
    assert before["count"] == 1
    shard(tmp_path / "shards/b.parquet", 5, 5)
    now = HFStreamingSource(path=str(tmp_path / "shards"), **options)
    assert "1 new (such as b.parquet)" in difference(before, identify(now), now)


def test_rows_of_a_table_in_another_order_count(tmp_path):
    shard(tmp_path / "one/a.parquet", 0, 6)
    before = identify(table(tmp_path / "one/a.parquet"))
    import pyarrow
    from pyarrow import parquet

    rows = parquet.read_table(tmp_path / "one/a.parquet")
    parquet.write_table(rows.take(pyarrow.array([1, 0, 2, 3, 4, 5])), tmp_path / "one/a.parquet")
    now = table(tmp_path / "one/a.parquet")
    assert "2 changed" in difference(before, identify(now), now)


def test_an_identity_survives_a_checkpoint_that_executes_nothing(tmp_path):
    source = folder(make(tmp_path / "data"))
    torch.save(identify(source), tmp_path / "state.ckpt")
    kept = checkpoints.read(tmp_path / "state.ckpt", mapped=True)
    assert difference(kept, identify(source), source) is None


def test_more_records_than_are_listed_are_still_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("data2vec_train.data.identity.LISTED_RECORDS", 5)
    root = make(tmp_path / "data")
    before = identify(folder(root))
    make(root, 1, 50)
    assert difference(before, identify(folder(root)), folder(root)) == "20 records then, 21 now"


def test_a_checkpoint_from_before_goes_on_with_a_warning(tmp_path, caplog):
    run = RunDirectory(tmp_path, tmp_path / "step", None, {"batches": 4})
    source = folder(make(tmp_path / "data"))
    same_data(OmegaConf.create({"resume": "auto"}), run, {"source": source})
    assert "did not record its data" in caplog.text


@pytest.mark.parametrize(
    ("before", "now"),
    [(["a", "b"], ["a", "c"]), (["a", "b"], ["b", "a"]), (["a"], None)],
    ids=["a letter is another one", "letters in another order", "no letters any more"],
)
def test_outputs_that_would_mean_something_else_are_refused(tmp_path, before, now):
    with pytest.raises(ConfigError, match="outputs of the head"):
        same_outputs(RunDirectory(tmp_path, None, None, {"outputs": before}), now)


# -------------------------------------------------------------------------------------------------- held out


def parts(names: list[str], labels: np.ndarray | None, fraction: float) -> tuple[set[str], set[str]]:
    """Those that train, and those held out."""
    origins = hashes_of(names)
    rows = set(choose(origins, labels, fraction).rows(origins, labels).tolist())
    return {name for row, name in enumerate(names) if row not in rows}, {names[row] for row in rows}


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("labelled", [True, False], ids=["with classes", "without classes"])
@pytest.mark.parametrize("where", ["x{}", "{}x"], ids=["before the others", "behind the others"])
def test_files_that_are_added_move_no_sample_into_the_held_out_part(fraction, labelled, where):
    names = [f"m{number}" for number in range(20)]
    trained, _ = parts(names, np.arange(20) % 2 if labelled else None, fraction)
    for step in range(60):
        names = sorted([*names, *(where.format(f"{step}-{number}") for number in range(1 + step % 9))])
        labels = np.array([sum(name.encode()) % 2 for name in names]) if labelled else None
        if not labelled:
            now, held_out = parts(names, labels, fraction)
            assert not trained & held_out
            trained = now
    if labelled:
        first = np.array([sum(name.encode()) % 2 for name in names[:200]])
        trained, _ = parts(names[:200], first, fraction)
        _, held_out = parts(names, np.array([sum(name.encode()) % 2 for name in names]), fraction)
        assert not trained & held_out


def test_growing_beyond_the_cap_moves_samples_to_training_only():
    names = [f"n{number}" for number in range(40_000)]
    held = [parts(names[:count], None, 0.1)[1] for count in (1_000, 5_000, 6_000, 12_000, 40_000)]
    for before, after in zip(held, held[1:], strict=False):
        assert len(after) <= UNLABELLED_HELD_OUT
        assert not {name for name in after if name in names} & set(names[: len(before)]) - before - set(names[1000:])
    assert held[-1] & set(names[:1000]) <= held[0]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10, 30])
def test_a_tiny_data_set_still_holds_something_out_and_keeps_something(count):
    for which in range(20):
        trained, held_out = parts([f"{which}/{number}" for number in range(count)], None, 0.1)
        assert trained
        assert held_out


def test_no_class_is_held_out_whole():
    names = [f"n{number}" for number in range(900)]
    labels = np.arange(900) // 3
    origins = hashes_of(names)
    rows = choose(origins, labels, 0.9).rows(origins, labels)
    assert set(np.delete(labels, rows)) == set(labels)


def test_a_single_sample_and_no_fraction_hold_nothing_out():
    assert parts(["one"], None, 0.9) == ({"one"}, set())
    assert parts(["one", "two"], None, 0.0) == ({"one", "two"}, set())
    assert parts([], None, 0.5) == (set(), set())


def test_the_same_name_in_two_shards_is_on_one_side():
    names = [f"{number % 50}.png" for number in range(200)]
    trained, held_out = parts(names, None, 0.3)
    assert not trained & held_out


def test_a_run_that_goes_on_never_tests_on_what_has_trained(tmp_path):
    for which in range(40):
        names = [f"{which}/{number}" for number in range(12)]
        labels = np.arange(12) % 3
        split = choose(hashes_of(names), labels, 0.2)
        trained = {names[row] for row in set(range(12)) - set(split.rows(hashes_of(names), labels).tolist())}
        kept = names[4:] + [f"{which}/new{number}" for number in range(8)]
        labels = np.append(labels[4:], np.arange(8) % 4)
        origins = hashes_of(kept)
        later = again(Split.of(json.loads(json.dumps(split.state()))), origins, labels)
        held_out = later.rows(origins, labels)
        assert not trained & {kept[row] for row in held_out}
        assert set(np.delete(labels, held_out)) == set(labels)


def test_another_parquet_shard_in_the_middle_moves_no_row(tmp_path):
    shard(tmp_path / "t/a.parquet", 0, 9)
    shard(tmp_path / "t/c.parquet", 20, 9)
    before = set(table(tmp_path / "t").hashes().tolist())
    shard(tmp_path / "t/b.parquet", 40, 9)
    assert before < set(table(tmp_path / "t").hashes().tolist())


def test_a_folder_with_another_name_has_the_same_split(tmp_path):
    shard(tmp_path / "t/a.parquet", 0, 9)
    shard(tmp_path / "other/a.parquet", 0, 9)
    assert table(tmp_path / "t").hashes().tolist() == table(tmp_path / "other").hashes().tolist()
    both = [str(make(tmp_path / name, 6, 6 * place)) for place, name in enumerate(["x", "y"])]
    (tmp_path / "y").rename(tmp_path / "w")
    hashes = set(folder(tmp_path / "x").hashes().tolist()) | set(folder(tmp_path / "w").hashes().tolist())
    assert set(folder(None, path=[both[0], str(tmp_path / "w")]).hashes().tolist()) == hashes


# ---------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "is no regular expression"),
        ("(a)(b)", "has 2 groups"),
        ("*", "is no regular expression"),
        ("a{99999999999999}", "is no regular expression"),
    ],
    ids=["an open bracket", "two groups", "nothing to repeat", "a repetition that is too large"],
)
def test_a_pattern_that_cannot_be_used_is_refused_without_loading_anything(pattern, said):
    command = ["modality=vision", "data=folder", "data.path=DIR", f"data.group_pattern='{pattern}'"]
    assert any(said in fault for fault in find_faults(command, config_name="train"))


def test_two_ways_to_group_and_groups_of_a_stream_are_refused():
    both = {"data": {"group_pattern": "a", "group_column": "b"}}
    assert "give one of them" in _groups_are_told_once(OmegaConf.create(both))
    stream = {
        "data": {"group_pattern": "a", "source": {"_target_": "data2vec_train.data.sources.hf.HFStreamingSource"}}
    }
    assert "of a stream nothing is held out" in _groups_are_told_once(OmegaConf.create(stream))


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [(r"é\d\d(\d)", 10), (r"^(a|b)/", 2), (r"é00", 11), (r"(?:é)(\d\d)", 2), (r"(z)?é\d\d[05]", None), ("", None)],
    ids=[
        "a part of the name",
        "the folder",
        "only some match, and by the whole of it",
        "one of two brackets counts",
        "a bracket that takes part in no match",
        "the empty pattern",
    ],
)
def test_names_are_grouped(tmp_path, caplog, pattern, groups):
    source = folder(make(tmp_path / "data"))
    if groups is None:
        with pytest.raises(DataError, match="no name matches, such as a/é000.png"):
            group(source, column=None, pattern=pattern)
        return
    group(source, column=None, pattern=pattern)
    assert len(set(source.origins().tolist())) == groups
    assert ("are in no group, such as" in caplog.text) == (groups == 11)


def test_groups_by_a_column_that_is_not_there_or_says_nothing(tmp_path):
    shard(tmp_path / "t/a.parquet", 0, 9)
    source = table(tmp_path / "t", fields=["who"])
    group(source, column="who", pattern=None)
    assert len(set(source.origins().tolist())) == 3
    with pytest.raises(ConfigError, match="no such column"):
        group(table(tmp_path / "t"), column="who", pattern=None)
    with pytest.raises(ConfigError, match="no such column"):
        group(folder(make(tmp_path / "data")), column="who", pattern=None)
    with pytest.raises(DataError, match="expected texts or numbers"):
        group(table(tmp_path / "t", fields=["image"], column="who", kind="text"), column="image", pattern=None)


def test_a_group_is_on_one_side_and_one_group_alone_trains(tmp_path):
    source = folder(make(tmp_path / "data", 40))
    group(source, column=None, pattern=r"é\d(\d)")
    rows = choose(source.origins(), None, 0.3).rows(source.origins(), None)
    tens = {source.name_of(row)[4] for row in rows}
    assert tens
    assert not tens & {source.name_of(row)[4] for row in range(40) if row not in rows}
    group(source, column=None, pattern="é")
    assert not len(choose(source.origins(), None, 0.3).rows(source.origins(), None))


# -------------------------------------------------------------------------------------------- run directories


def run_dir(path: Path, *, summary=None, metrics=False, config=None, checkpoint=None) -> Path:
    path.mkdir()
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    if metrics:
        (path / "metrics.csv").write_text("step,train/loss\n1,2\n")
    if config is not None:
        (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    if checkpoint is not None:
        content = {"config": checkpoint, "DataModule": {"split": {}}}
        checkpoints.write(content, path / "checkpoints/step-00000002", pointers=["last"], keep_last=1)
    return path


def snapshot(path: Path) -> dict[str, bytes]:
    files = {file.relative_to(path): file for file in path.rglob("*") if file.is_file() and file.name != "lock"}
    return {str(name): file.read_bytes() for name, file in files.items()}


OWN = {"resume": "auto", "seed": 0}
DONE = {"status": "finished", "rankme": 1.0}
OTHER = {"resume": "auto", "seed": 1}


@pytest.mark.parametrize(
    ("held", "resume", "said"),
    [
        ({"summary": DONE, "config": OWN}, "auto", None),
        ({"summary": DONE, "metrics": True, "config": OWN}, "auto", None),
        ({"summary": DONE, "metrics": True, "config": OWN}, "changed", "no checkpoints"),
        ({"summary": DONE, "config": OWN}, "never", "already holds a run"),
        ({"summary": DONE, "config": OTHER}, "auto", "a run with other settings: seed=0"),
        ({"summary": DONE}, "auto", "summary.json of a run, but neither"),
        ({"metrics": True}, "auto", "metrics.csv of a run, but neither"),
        ({"metrics": True}, "changed", "metrics.csv of a run, but neither"),
        ({"metrics": True, "checkpoint": OTHER}, "auto", "a run with other settings: seed=0"),
        ({"checkpoint": OTHER}, "auto", "a run with other settings: seed=0"),
        ({"checkpoint": OWN}, "never", "already holds a run"),
    ],
    ids=[
        "finished, and everything else was removed",
        "finished, without checkpoints",
        "finished, without checkpoints, to be changed",
        "finished, without checkpoints, never to go on",
        "finished, of other settings",
        "finished, without a config",
        "metrics of nobody knows what",
        "metrics of nobody knows what, to be changed",
        "no config, and a checkpoint of other settings",
        "a checkpoint of other settings alone",
        "a checkpoint alone, never to go on",
    ],
)
def test_half_a_run_is_told_or_refused_and_left_alone(tmp_path, held, resume, said):
    path = run_dir(tmp_path / "run", **held)
    before = snapshot(path)
    cfg = OmegaConf.create(OWN | {"resume": resume})
    if said is None:
        assert open_run(cfg, path).summary == DONE
    else:
        with pytest.raises(ConfigError, match=said) as error:
            open_run(cfg, path)
        assert "\n" not in str(error.value)
    assert snapshot(path) == before


def test_a_checkpoint_alone_goes_on_with_the_settings_that_it_holds(tmp_path):
    path = run_dir(tmp_path / "run", checkpoint=OWN)
    found = open_run(OmegaConf.create(OWN), path)
    assert (found.step, found.summary, found.data) == (2, None, {"split": {}})


def test_a_directory_that_was_removed_or_made_again_is_lost(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    outputs.lock_directory(path)
    assert not outputs.lost(path)
    shutil.rmtree(path)
    assert outputs.lost(path)
    path.mkdir()
    assert outputs.lost(path)
    (path / "lock").write_text("")
    assert outputs.lost(path)


def test_nothing_is_written_where_a_run_directory_was_removed(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    outputs.lock_directory(path)
    shutil.rmtree(path)
    io = FolderCheckpointIO(asynchronous=False)
    io.save_checkpoint({}, path / "checkpoints/step-00000001", {"pointers": ["last"], "keep_last": 1})
    assert io.failure is not None
    assert not path.exists()
    with pytest.raises(SaveError, match="was removed, or replaced by another directory"), disk_trouble(path):
        (path / "metrics.csv").open("a")
