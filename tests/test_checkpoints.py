"""Checkpoint folders: whole or not there, checked before they are read."""

import errno
import io
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from data2vec_train import checkpoints
from data2vec_train.errors import ConfigError
from data2vec_train.system import outputs


def content(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {"state_dict": {"w": torch.randn(64, 16, generator=generator)}, "global_step": step, "config": {"a": [1]}}


def save(directory: Path, step: int, *, best: bool = False, keep_last: int = 2) -> Path:
    folder = directory / checkpoints.name_of(step)
    pointers = ["last", "best"] if best else ["last"]
    checkpoints.write(content(step), folder, pointers=pointers, keep_last=keep_last)
    return folder


def is_step(state: Path, step: int) -> bool:
    found = checkpoints.read(state)
    return found["global_step"] == step and torch.equal(found["state_dict"]["w"], content(step)["state_dict"]["w"])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_written_is_read_back(tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    folder = save(directory, 3)
    assert names(folder) == ["manifest.json", "state.ckpt"]
    for path in (tmp_path / "run", directory, directory / "last", folder, folder / "state.ckpt"):
        assert is_step(checkpoints.resolve(path), 3), path
    assert checkpoints.run_of(folder / "state.ckpt") == tmp_path / "run"
    assert checkpoints.resolve(tmp_path) is None


def test_the_newest_and_what_a_pointer_names_stay(directory):
    for step in range(1, 7):
        save(directory, step, best=step == 2)
    assert names(directory) == ["best", "last", "step-00000002", "step-00000005", "step-00000006"]
    assert is_step(checkpoints.resolve(directory / "best"), 2)
    assert is_step(checkpoints.resolve(directory / "last"), 6)


def test_a_step_is_written_again(directory):
    save(directory, 1)
    folder = save(directory, 2)
    (folder / "state.ckpt").write_bytes(b"damaged")
    save(directory, 2)
    assert is_step(checkpoints.resolve(directory), 2)
    assert names(directory) == ["last", "step-00000001", "step-00000002"]


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "checkpoints"


class Killed(BaseException):
    pass


STEPS_ON_DISK = [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (shutil, "rmtree"), (io, "open")]


def test_a_kill_between_any_two_operations_costs_no_earlier_checkpoint(tmp_path, monkeypatch):
    """Every operation on the disk is made to be the last one in turn."""
    for number in range(100):
        directory = tmp_path / str(number) / "checkpoints"
        save(directory, 1, best=True)
        save(directory, 2)
        done = 0

        def ending(function, number=number):
            def call(*args, **options):
                nonlocal done
                if done == number:
                    raise Killed
                done += 1
                return function(*args, **options)

            return call

        with monkeypatch.context() as patched:
            for owner, name in STEPS_ON_DISK:
                patched.setattr(owner, name, ending(getattr(owner, name)))
            try:
                save(directory, 3)
                break
            except Killed:
                pass
        found = checkpoints.resolve(directory)
        assert is_step(found, 3) or is_step(found, 2), number
        assert is_step(
            checkpoints.resolve(directory / "last"), checkpoints.step_of(checkpoints.pointed(directory / "last"))
        )
        assert is_step(checkpoints.resolve(directory / "best"), 1)
        outputs.sweep(directory)
        assert not [name for name in names(directory) if name.startswith(".")]
    assert number > 10  # so many operations there were


def test_a_hundred_flipped_bits_are_noticed(directory):
    save(directory, 1)
    state = save(directory, 2) / "state.ckpt"
    whole = state.read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        state.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        with pytest.raises(checkpoints.DamagedCheckpoint, match="SHA-256"):
            checkpoints.check(state.parent)
        with pytest.raises(checkpoints.DamagedCheckpoint):
            checkpoints.resolve(directory / "last")
        assert is_step(checkpoints.resolve(directory), 1)  # the newest that is whole
    state.write_bytes(whole)
    assert is_step(checkpoints.resolve(directory), 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "state.ckpt").write_bytes(b"x"), "has 1 bytes"),
        (lambda folder: (folder / "state.ckpt").unlink(), "state.ckpt is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"state'), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "cannot be read"),
    ],
)
def test_damage_is_named(damage, message, directory):
    folder = save(directory, 1)
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        checkpoints.check(folder)
    with pytest.raises(ConfigError, match="none of the 1 checkpoints"):
        checkpoints.newest(directory)


@pytest.mark.parametrize("room", [0, 1, 500, 3000])
def test_a_full_disk_costs_no_earlier_checkpoint(room, directory, monkeypatch):
    save(directory, 1)
    left = room

    def write(self, data):
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints._Hashed, "write", write)
        with pytest.raises(OSError, match="No space left") as caught:
            save(directory, 2)
    assert caught.value.errno == errno.ENOSPC
    assert names(directory) == ["last", "step-00000001"]
    assert is_step(checkpoints.resolve(directory), 1)


def test_a_pickle_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state": Payload()}, tmp_path / "state.ckpt")
    with pytest.raises(Exception, match=r"[Uu]nsupported|weights_only|Weights only"):
        checkpoints.read(tmp_path / "state.ckpt")
    assert not (tmp_path / "ran").exists()
