"""Files: atomic writing, JSON and JSON lines, each from both sides."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim import io
from brim.errors import CheckpointError
from brim.io import atomic

resource = pytest.importorskip("resource") if os.name != "nt" else None
POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX permissions, links and limits")


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_import_is_light() -> None:
    code = "import sys, brim.io; print([m for m in ('safetensors', 'torch', 'rich', 'psutil') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Atomic writing


def test_atomic_write_creates_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with io.atomic_write(path, "w") as file:
        file.write("one\n")
        assert not path.exists()
    with io.atomic_write(path) as file:
        file.write(b"two\n")
        assert path.read_bytes() == b"one\n"
    assert path.read_bytes() == b"two\n"
    assert names_in(tmp_path) == ["a.txt"]


def test_atomic_write_text_is_utf8_with_plain_line_ends(tmp_path: Path) -> None:
    with io.atomic_write(tmp_path / "a.txt", "w") as file:
        file.write("é\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\n".encode()


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_failure_inside_the_block_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with io.atomic_write(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]
    if isinstance(error, OSError):
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_failing_system_call_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, function, fail)
        with pytest.raises(OSError, match=re.escape(os.strerror(code))), io.atomic_write(path) as file:
            file.write(b"new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


@POSIX
def test_a_real_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    """The limit on file sizes makes the system refuse a write in the middle, as a full disk does."""
    path = tmp_path / "a.safetensors"
    io.save_arrays(path, {"x": np.zeros(3)})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=re.escape(str(path))):
            io.save_arrays(path, {"x": np.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["a.safetensors"]


@POSIX
def test_permission_denied_is_an_os_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError), io.atomic_write(tmp_path / "a"):
        pass
    assert names_in(tmp_path) == []


@POSIX
def test_permissions(tmp_path: Path) -> None:
    old_mask = os.umask(0o027)
    try:
        io.write_json(tmp_path / "new.json", 1)
        private = tmp_path / "private.json"
        private.write_text("0")
        private.chmod(0o600)
        io.write_json(private, 1)
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE((tmp_path / "new.json").stat().st_mode) == 0o640
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert private.read_text() == "1\n"


@POSIX
def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.json").write_text("0")
    (tmp_path / "link.json").symlink_to("real/a.json")
    io.write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real/a.json").read_text() == "1\n"
    assert names_in(tmp_path / "real") == ["a.json"]


@POSIX
def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="regular file"), io.atomic_write(tmp_path / "pipe"):
        pass
    with pytest.raises(IsADirectoryError), io.atomic_write(tmp_path):
        pass
    with pytest.raises(ValueError, match="mode"), io.atomic_write(tmp_path / "a", "a"):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_replacing_is_tried_again_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may hold the file open for a moment there."""
    failures = [PermissionError(errno.EACCES, "held")] * 2
    real_replace = os.replace

    def replace(source: str, target: str) -> None:
        if failures:
            raise failures.pop()
        real_replace(source, target)

    monkeypatch.setattr(atomic, "_WINDOWS", True)
    monkeypatch.setattr(atomic, "_RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(atomic.os, "replace", replace)
    io.write_json(tmp_path / "a.json", 1)
    assert io.read_json(tmp_path / "a.json") == 1


@POSIX
def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_fsync = os.fsync

    def fsync(handle: int, code: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        real_fsync(handle)

    monkeypatch.setattr(atomic.os, "fsync", lambda handle: fsync(handle, errno.EINVAL))
    io.write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr(atomic.os, "fsync", lambda handle: fsync(handle, errno.EIO))
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))):
        io.write_json(tmp_path / "a.json", 2)


def test_remove_leftovers(tmp_path: Path) -> None:
    (tmp_path / ".brim-0123456789abcdef.tmp").write_text("half")
    (tmp_path / ".brim-0123456789abcde0.tmp").mkdir()
    (tmp_path / ".brim-0123456789abcde0.tmp/a").write_text("half")
    (tmp_path / ".brim-mine.tmp").write_text("not of this kind")
    (tmp_path / "a").write_text("whole")
    atomic.remove_leftovers(tmp_path, older_than_s=60)
    assert len(names_in(tmp_path)) == 4
    atomic.remove_leftovers(tmp_path)
    assert names_in(tmp_path) == [".brim-mine.tmp", "a"]


# JSON

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text().filter(lambda text: text not in ("NaN", "Infinity", "-Infinity")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, database=None)
@given(PLAIN)
def test_json_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    io.write_json(path, value)
    again = io.read_json(path)
    assert again == value
    assert repr(again) == repr(value)  # also -0.0, and 1 against 1.0 and True


def test_json_takes_numpy_scalars_and_non_finite_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    scalars = [np.float32(0.5), np.float64(0.1), np.int64(7), np.bool_(True), ml_dtypes.bfloat16(2), np.str_("s")]
    io.write_json(
        path, {"scalars": scalars, "tuple": (1, 2), "limits": [math.inf, -math.inf, math.nan, np.float32("inf")]}
    )
    strict = json.loads(path.read_text(), parse_constant=pytest.fail)  # other tools find standard JSON
    assert strict["limits"] == ["Infinity", "-Infinity", "NaN", "Infinity"]
    again = io.read_json(path)
    assert again["scalars"] == [0.5, 0.1, 7, True, 2.0, "s"]
    assert again["tuple"] == [1, 2]
    assert again["limits"][:2] == [math.inf, -math.inf]
    assert math.isnan(again["limits"][2])
    assert again["limits"][3] == math.inf


@pytest.mark.parametrize(
    ("value", "error", "place"),
    [
        ({"a": {1: 2}}, TypeError, "a: expected string keys"),
        ({"a": [0, np.zeros(3)]}, TypeError, r"a\[1\].*save_arrays"),
        ({"a": Path("x")}, TypeError, "a: "),
        ({"a": 1j}, TypeError, "a: "),
        (np.longdouble(1), TypeError, "value: "),
        ({"a": {"b": "NaN"}}, ValueError, "a.b: "),
    ],
)
def test_json_refuses_what_it_cannot_hold(tmp_path: Path, value: object, error: type[Exception], place: str) -> None:
    path = tmp_path / "a.json"
    io.write_json(path, "old")
    with pytest.raises(error, match=place):
        io.write_json(path, value)
    assert io.read_json(path) == "old"
    assert names_in(tmp_path) == ["a.json"]


def test_json_refuses_what_contains_itself(tmp_path: Path) -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="contains itself"):
        io.write_json(tmp_path / "a.json", loop)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 column 1: the file is empty"),
        (b'{"a": 1,\n "b": }', "line 2 column 7"),
        (b'{"a": 1', "line 1 column 8"),
        (b'{"a":\n "\xff"}', "line 2: byte 8 is not UTF-8"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "not acceptable"),
        (b"1" * 5000, "not acceptable"),
    ],
)
def test_malformed_json_is_refused_by_name_and_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        io.read_json(path)
    assert str(path) in str(caught.value)


def test_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    for read in (io.read_json, io.read_jsonl, io.load_arrays, io.verify_arrays):
        with pytest.raises(CheckpointError, match=r"gone.*cannot be read"):
            read(tmp_path / "gone")


def test_json_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert io.read_json(tmp_path / "a.json") == {"a": 1}


# JSON lines


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"epoch": epoch, "loss": math.inf} for epoch in range(5)]
    for record in records:
        io.append_jsonl(path, record)
    assert io.read_jsonl(path) == records
    assert io.truncate_jsonl(path, 3) == 3
    assert io.read_jsonl(path) == records[:3]
    assert io.truncate_jsonl(path, 9) == 3
    assert io.truncate_jsonl(path, 0) == 0
    assert io.read_jsonl(path) == []
    assert io.truncate_jsonl(tmp_path / "missing", 2) == 0
    assert names_in(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [1, 2, 10, 14])
def test_a_half_line_is_dropped_and_overwritten(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(3):
        io.append_jsonl(path, {"step": step, "é": 1})
    os.truncate(path, path.stat().st_size - cut)
    assert [record["step"] for record in io.read_jsonl(path)] == [0, 1]
    assert io.truncate_jsonl(path, 5) == 2
    io.append_jsonl(path, {"step": 2})
    assert [record["step"] for record in io.read_jsonl(path)] == [0, 1, 2]


def test_a_half_line_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n{"long": "' + b"x" * 200_000)
    io.append_jsonl(path, {"a": 2})
    assert io.read_jsonl(path) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b"x" * 200_000)
    io.append_jsonl(path, {"a": 3})
    assert io.read_jsonl(path) == [{"a": 3}]


def test_jsonl_refuses(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n[2]\n{"a": 3}\n')
    with pytest.raises(CheckpointError, match="line 2: expected a JSON object"):
        io.read_jsonl(path)
    path.write_bytes(b'{"a": 1}\n{"a" 2}\n{"a": 3}\n')
    with pytest.raises(CheckpointError, match="line 2 column 6"):
        io.read_jsonl(path)
    with pytest.raises(TypeError, match="expected a dict"):
        io.append_jsonl(path, [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep"):
        io.truncate_jsonl(path, -1)


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    io.append_jsonl(path, {"a": 1})
    real_write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: real_write(handle, data[:3]))
        with pytest.raises(OSError, match=r"metrics\.jsonl") as caught:
            io.append_jsonl(path, {"a": 2})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b'{"a": 1}\n'
