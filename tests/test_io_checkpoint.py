"""Checkpoints: saved, kept, loaded, compared; damaged and mixed ones refused with the newest intact one named."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from brim import io
from brim.errors import CheckpointError, DTypeError
from brim.io import atomic


def parts_of(step: int) -> dict[str, dict[str, np.ndarray]]:
    weight = np.full((3, 2), step, np.float32)
    return {
        "model": {"weight": weight, "bias": weight[0].astype(ml_dtypes.bfloat16)},
        "optimizer": {"momentum": -weight},
    }


def save(folder: Path, step: int, name: str = "last", **options: int) -> Path:
    return io.save_checkpoint(folder, name, parts_of(step), {"epoch": step, "best": math.inf}, step=step, **options)


def folders(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 600)
    assert sorted(os.listdir(path)) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert path == io.latest_checkpoint(tmp_path / "run")
    loaded = io.load_checkpoint(path)
    assert (loaded.path, loaded.name, loaded.step) == (path, "last", 600)
    assert loaded.state == {"epoch": 600, "best": math.inf}
    assert list(loaded.arrays_by_part) == ["model", "optimizer"]
    for part, arrays in parts_of(600).items():
        assert list(loaded.arrays_by_part[part]) == list(arrays)
        for name, array in arrays.items():
            assert loaded.arrays_by_part[part][name].dtype == array.dtype
            np.testing.assert_array_equal(loaded.arrays_by_part[part][name], array)


def test_each_series_is_kept_by_itself(tmp_path: Path) -> None:
    assert io.latest_checkpoint(tmp_path / "run") is None
    assert io.list_checkpoints(tmp_path / "run") == []
    for step in range(1, 5):
        save(tmp_path, step)
        if step == 2:
            save(tmp_path, step, "best", keep=1)
    assert folders(tmp_path) == ["000003-best-2", "000004-last-3", "000005-last-4"]
    assert [path.name for path in io.list_checkpoints(tmp_path)] == ["000005-last-4", "000004-last-3", "000003-best-2"]
    assert [path.name for path in io.list_checkpoints(tmp_path, "best")] == ["000003-best-2"]
    save(tmp_path, 5, "best", keep=1)
    assert folders(tmp_path) == ["000004-last-3", "000005-last-4", "000006-best-5"]
    assert io.latest_checkpoint(tmp_path).name == "000006-best-5"
    assert io.latest_checkpoint(tmp_path, "last").name == "000005-last-4"
    assert io.latest_checkpoint(tmp_path, "other") is None


def test_going_back_to_an_earlier_step_makes_that_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 10):
        path = save(tmp_path, step)
    assert io.latest_checkpoint(tmp_path) == path
    assert folders(tmp_path) == ["000002-last-20", "000003-last-10"]


def test_a_series_with_dashes_and_a_millionth_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 3, "a-5")
    path = path.rename(path.with_name("999999-a-5-3"))
    assert io.load_checkpoint(path).name == "a-5"
    newer = save(tmp_path, 4, "a-5")
    assert newer.name == "1000000-a-5-4"
    assert io.list_checkpoints(tmp_path, "a-5") == [newer, path]


def test_foreign_folders_are_left_alone_and_leftovers_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    top = tmp_path / "checkpoints"
    (top / "my copy").mkdir()
    (top / "notes.txt").write_text("mine")
    shutil.copytree(top / "000001-last-1", top / ".brim-0123456789abcdef.tmp")
    (tmp_path / ".brim-0123456789abcdef.tmp").write_text("of a live writer, perhaps")
    assert [path.name for path in io.list_checkpoints(tmp_path)] == ["000001-last-1"]
    save(tmp_path, 2, keep=1)
    assert folders(tmp_path) == ["000002-last-2", "my copy", "notes.txt"]
    assert (tmp_path / ".brim-0123456789abcdef.tmp").exists()
    os.utime(tmp_path / ".brim-0123456789abcdef.tmp", (0, 0))
    save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "../x"}, ValueError, "name: expected letters"),
        ({"name": ".x"}, ValueError, "name: expected letters"),
        ({"arrays_by_part": {"a/b": {}}}, ValueError, "part: expected letters"),
        ({"arrays_by_part": {"Model": {}, "model": {}}}, ValueError, "only by case"),
        ({"arrays_by_part": {"model": {"w": [1]}}}, DTypeError, "'w'"),
        ({"state": [1]}, TypeError, "state: expected a dict"),
        ({"state": {"a": {1: 2}}}, TypeError, "a: expected string keys"),
        ({"step": -1}, ValueError, "step: "),
        ({"step": 1.5}, ValueError, "step: "),
        ({"keep": 0}, ValueError, "keep: "),
    ],
)
def test_bad_arguments_are_refused_and_nothing_written(
    tmp_path: Path, options: dict, error: type[Exception], message: str
) -> None:
    good = {"folder": tmp_path, "name": "last", "arrays_by_part": parts_of(1), "state": {}, "step": 1}
    save(tmp_path, 1)
    with pytest.raises(error, match=message):
        io.save_checkpoint(**{**good, **options})
    assert folders(tmp_path) == ["000001-last-1"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
def test_a_failing_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    """Each call in turn fails, from the first on."""
    save(tmp_path, 1)
    real = getattr(os, function)
    failed = 0
    for allowed in range(100):
        calls = 0

        def fail(*args: object, allowed: int = allowed, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == allowed + 1:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, function, fail)
            try:
                save(tmp_path, 2)
                raised = None
            except OSError as error:
                raised = error.errno
        assert raised in (None, code)
        failed += raised is not None
        assert calls >= allowed
        newest = io.load_checkpoint(io.latest_checkpoint(tmp_path))
        assert newest.step in (1, 2)
        leftovers = [name for name in folders(tmp_path) if name.startswith(".")]
        assert not leftovers or not raised  # removing an older one may fail: the save is good, the next one cleans up
        if calls <= allowed:
            break
    assert failed >= 3
    assert calls <= allowed  # at last nothing failed, and:
    assert newest.step == 2


def test_a_second_writer_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cleans up at its start what the first is just writing."""
    real_fsync = os.fsync

    def fsync(handle: int) -> None:
        real_fsync(handle)
        atomic.remove_leftovers(tmp_path / "checkpoints")

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="does another process save into"):
        save(tmp_path, 1)
    assert folders(tmp_path) == []


# Damage

FILES = ["model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "remove", "older", "empty"])
def test_damage_is_refused_and_the_newest_intact_checkpoint_named(tmp_path: Path, file: str, damage: str) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    third, second, first = io.list_checkpoints(tmp_path)
    (second / "model.safetensors").write_bytes(b"x")  # damaged too: not the one to name
    path = third / file
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "older":
        shutil.copy(first / file, path)
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        path.write_bytes({"flip": flipped, "truncate": content[:-7], "extend": content + b" ", "empty": b""}[damage])
    with pytest.raises(CheckpointError) as caught:
        io.load_checkpoint(third)
    message = str(caught.value)
    assert str(third) in message
    assert message.endswith(f"The newest intact checkpoint beside it: {first}")
    if (file, damage) == ("model.safetensors", "older"):
        assert "files of different checkpoints were mixed" in message
    assert io.load_checkpoint(first).step == 1


def test_every_flipped_byte_of_the_state_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    state = path / "state.json"
    content = state.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        state.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"state\.json"):
            io.load_checkpoint(path)
    state.write_bytes(content)
    assert io.load_checkpoint(path).step == 1


def test_no_intact_checkpoint_is_said_too(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json: cannot be read[^\n]*\nNo other intact checkpoint"):
        io.load_checkpoint(path)


def test_what_is_not_a_checkpoint_is_refused_with_the_newest_one(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for wrong in (tmp_path, tmp_path / "checkpoints" / "000009-last-9", tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            io.load_checkpoint(wrong)
    with pytest.raises(CheckpointError, match="none near it"):
        io.load_checkpoint(tmp_path / "a" / "b" / "c")


def test_a_state_that_looks_like_a_checksum_is_harmless(tmp_path: Path) -> None:
    state = {"brim.sha256": "0" * 64, "text": '"brim.sha256": "' + "0" * 64 + '"'}
    path = io.save_checkpoint(tmp_path, "last", {"model": {"brim.sha256": np.zeros(2)}}, state, step=0)
    assert io.load_checkpoint(path).state == state


# Compatibility


def test_compatible() -> None:
    expected = {"weight": ((3, 2), np.dtype("float32")), "bias": ((3,), None)}
    found = {"bias": ([3], "float64"), "weight": ((3, 2), "float32")}
    io.check_compatible(expected, found, "model.safetensors")


def test_every_difference_is_listed() -> None:
    expected = {"a": ((1,), "float32"), "b": ((2, 3), "float32"), "c": ((4,), "float32"), "d": ((), "float32")}
    found = {"b": ((3, 2), "float32"), "c": ((4,), "float16"), "d": ((1,), "float32"), "z": ((1,), "float32")}
    with pytest.raises(CheckpointError) as caught:
        io.check_compatible(expected, found, "run/model.safetensors")
    lines = str(caught.value).splitlines()
    assert lines[0] == ("run/model.safetensors: does not fit: 1 missing, 1 unexpected, 2 other shape, 1 other dtype")
    assert lines[1:-1] == [
        "  missing: a",
        "  unexpected: z",
        "  other shape: b: expected (2, 3), found (3, 2)",
        "  other shape: d: expected (), found (1,)",
        "  other dtype: c: expected float32, found float16",
    ]
    assert "same architecture" in lines[-1]


def test_long_lists_are_cut() -> None:
    with pytest.raises(CheckpointError) as caught:
        io.check_compatible({f"layer{n}": ((1,), "float32") for n in range(1000)}, {}, "model")
    lines = str(caught.value).splitlines()
    assert len(lines) == 23
    assert lines[21] == "  missing: ... and 980 more"


def test_a_common_prefix_is_recognised() -> None:
    expected = {"0.weight": ((1,), "float32"), "0.bias": ((1,), "float32")}
    found = {f"module.{name}": spec for name, spec in expected.items()}
    with pytest.raises(CheckpointError, match=r"prefix 'module\.'"):
        io.check_compatible(expected, found, "model")
    del found["module.0.bias"]
    with pytest.raises(CheckpointError, match="same architecture"):
        io.check_compatible(expected, found, "model")
