"""Files: replacement, links, digests, and errors of damaged files."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imgcap_jax.errors import UserError
from imgcap_jax.files import (
    appending,
    check_writable,
    damages,
    is_private,
    local_path,
    owning,
    parse_json,
    read_json,
    replacing,
    write_digests,
    write_text,
)


def test_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("mine")
    link.symlink_to(target)
    check_writable(link)
    write_text(link, "new")
    assert (target.read_text(), link.read_text(), link.is_symlink()) == ("mine", "new", False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(TypeError), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half" + None)  # type: ignore[operator]
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_new_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_long_names_can_be_written(tmp_path: Path) -> None:
    name = "x" * 255  # the longest that file systems accept
    write_text(tmp_path / name, "text")
    assert (tmp_path / name).read_text() == "text"


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't be written .*: choose another place"):
        write_text(tmp_path / "file" / "inner", "text")


def test_links_are_not_appended_to(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        appending(link)
    assert not target.exists()


def test_lock_neither_follows_a_link_nor_truncates(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(target)
    with pytest.raises(UserError, match="symbolic link; delete it"), owning(tmp_path / "run", "training"):
        pass
    assert target.read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting"),
        (b"\xff{}", "byte 0 is not utf-8"),
        (b"[" * 200_000, "too deeply nested"),
        (b'{"a": Infinity}', "Infinity is not a JSON value"),
        (b'{"a": NaN}', "NaN is not a JSON value"),
        (b'{"a": "\\ud83d"}', "surrogates not allowed"),
        (b"9" * 5000, "digits"),
        (b"", "Expecting value"),
    ],
)
def test_damaged_json_is_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"file\.json is damaged \(.*{reason}.*\): make it again") as caught:
        read_json(path, "make it again")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing: make it again"):
        read_json(tmp_path / "none.json", "make it again")
    with pytest.raises(UserError, match=r"can't be read .*: make it again"):
        read_json(tmp_path, "make it again")


def test_whole_surrogate_pairs_are_text() -> None:
    assert parse_json('"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


def test_digests_find_every_change(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("a", "b", "inner/c"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    assert damages(tmp_path) == []  # no digests yet
    write_digests(tmp_path)
    assert damages(tmp_path) == []
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.stdout.count(": OK") == 3
    content = bytearray((tmp_path / "a").read_bytes())
    content[50] ^= 1
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").unlink()
    (tmp_path / "d").write_bytes(b"")
    assert damages(tmp_path) == ["a has changed", "b is missing"]  # an added file is no damage


def test_digests_that_are_not_complete_are_damage(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    write_digests(tmp_path)
    whole = (tmp_path / "SHA256SUMS").read_text().splitlines(keepends=True)
    for lines in ([], whole[:1], whole[:2], whole[1:], whole[2:], [*whole, "x"], ["x", *whole]):
        (tmp_path / "SHA256SUMS").write_text("".join(lines))
        assert damages(tmp_path) == ["SHA256SUMS has changed"], lines


def test_digests_that_cannot_be_read_are_damage(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "SHA256SUMS").mkdir()
    assert damages(tmp_path) == ["SHA256SUMS has changed"]
    (tmp_path / "SHA256SUMS").rmdir()
    os.mkfifo(tmp_path / "SHA256SUMS")
    assert damages(tmp_path) == ["SHA256SUMS has changed"]
    (tmp_path / "SHA256SUMS").unlink()
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {'n' * 5000}\n{'0' * 64}  \0\n# 2 files\n")
    assert damages(tmp_path) == [f"{'n' * 5000} is missing", "\0 is missing"]


def test_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match=r"pipe\.json is a pipe or a device; give a file"):
        read_json(tmp_path / "pipe.json", "restore it")
    with pytest.raises(OSError, match="No such device"):
        appending(tmp_path / "pipe.json")


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket", "hf://user/name", "https://x.org/a", "gs:/bucket"])
def test_urls_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="only paths of local"):
        local_path(url)


@pytest.mark.parametrize("path", ["runs/a", "/a/b", "a:b/c", "./c:/x", "x", "~/a"])
def test_paths_are_accepted(path: str) -> None:
    assert local_path(path) == Path(path)


def test_folder_that_others_can_write_is_not_private(tmp_path: Path) -> None:
    assert is_private(tmp_path / "new")
    for mode in (0o777, 0o770):
        (tmp_path / "open").mkdir(exist_ok=True)
        (tmp_path / "open").chmod(mode)
        assert not is_private(tmp_path / "open")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is a device of Linux")
def test_errors_of_the_disk_are_one_line() -> None:
    from imgcap_jax.files import disk_errors

    full = pytest.raises(UserError, match="the log: the disk is full")
    with full, disk_errors("the log"), open("/dev/full", "w") as file:
        file.write("x" * 100_000)
    with pytest.raises(UserError, match="the log: Input/output error"), disk_errors("the log"):
        raise OSError(5, "Input/output error")
    with pytest.raises(UserError, match="the log: Input/output error"), disk_errors("the log"):
        raise ValueError("DATA_LOSS: write failed [OS error 5: Input/output error]")  # TensorStore's errors look so
    with pytest.raises(ValueError, match="other"), disk_errors("the log"):
        raise ValueError("other")


def test_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    with pytest.raises(ZeroDivisionError), owning(folder, "training"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with owning(folder, "training"):
        assert (folder / ".lock").exists()
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    (tmp_path / "empty").mkdir()
    with owning(tmp_path / "empty", "training"):
        pass
    assert (tmp_path / "empty").is_dir()  # it was there before


def test_lock_has_one_owner_although_its_file_is_deleted_each_time(tmp_path: Path) -> None:
    """Locks of threads exclude each other like those of processes, because each opens the file itself."""
    folder, inside, refused, taken = tmp_path / "runs" / "run", [], [], []

    def work(number: int) -> None:
        for _ in range(200):
            try:
                with owning(folder, "training"):
                    inside.append(number)
                    owners = len(inside)
                    time.sleep(1e-4)
                    taken.append(owners)
                    inside.pop()
            except UserError as error:
                refused.append(str(error))
                time.sleep(1e-4)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert set(taken) == {1}
    assert len(taken) + len(refused) == 1200
    assert len(taken) > 20
    assert set(refused) <= {f"another process is training {folder}; wait for it, or choose another folder"}
    assert not (folder / ".lock").exists()


def test_lock_that_a_killed_process_left_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    with owning(tmp_path, "training"):
        pass
