"""Checkpoints: odd folder names, damaged files, and which of them are kept."""

import errno
import json
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgcap_jax.errors import UserError
from imgcap_jax.files import file_digest
from imgcap_jax.training.checkpoints import Checkpoints, Progress, restore_best
from imgcap_jax.training.orbax_files import Writer, read_arrays
from imgcap_jax.training.parallel import DataParallel

STATE = {"w": jnp.arange(300.0), "b": {"c": jnp.ones((2, 2))}}


def save(folder: Path, *steps: int) -> None:
    """Each checkpoint as a validation writes it, of parameters that are the best ones."""
    checkpoints = Checkpoints(folder, writing=True)
    for step in steps:
        before = Progress(step, {"batches": step}, best_step=step - 1 if step > 1 else None, validation_due=True)
        checkpoints.save({**STATE, "w": STATE["w"] + step}, before)
        checkpoints.save_best(step, {**STATE, "w": STATE["w"] - step})
        checkpoints.save_validated(replace(before, best_step=step))
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 1, 2 and 3, of which two are kept."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    save(folder, 1, 2, 3)
    return folder


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_two_checkpoints_are_kept(saved: Path) -> None:
    assert steps(saved / "checkpoints" / "newest") == steps(saved / "checkpoints" / "best") == [2, 3]


ODD = [
    *("with blank", "a[1]", "a[", "]", "[!x]", "a{1}", "a*b", "a?b", "a\\b", "a\\", "a&b", "a'b", 'a"b', "a:b", "a|b"),
    *(
        "a#b",
        "a%20b",
        "50%",
        "a,b",
        "a=b",
        "a@b",
        "a;b",
        "a!b",
        "$HOME",
        "~x",
        "-x",
        "..x",
        "trailing ",
        "a\nb",
        "a\tb",
    ),
    *("\u00fc", "u\u0308", "\u65b0", "\U0001f600", "gs:x"),
]


@pytest.mark.parametrize("name", ODD)
def test_odd_folder_names(name: str, tmp_path: Path) -> None:
    (tmp_path / "a1").mkdir()  # what a[1] would match as a pattern
    folder = tmp_path / name / "run"
    save(folder, 1)
    save(folder, 2)  # a resumed run
    checkpoints = Checkpoints(folder)
    restored, progress = checkpoints.restore(STATE)
    checkpoints.close()
    assert progress == Progress(2, {"batches": 2}, best_step=2)
    np.testing.assert_array_equal(restored["w"], np.arange(300.0) + 2)
    np.testing.assert_array_equal(restore_best(folder, STATE)[0]["w"], np.arange(300.0) - 2)
    assert steps(folder / "checkpoints" / "newest") == [1, 2]
    moved = tmp_path / "moved"
    (tmp_path / name).rename(moved)
    np.testing.assert_array_equal(restore_best(moved / "run", STATE)[0]["w"], np.arange(300.0) - 2)


def damage(path: Path, how: str, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "halve":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flip" and content:
        bit = generator.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
    else:
        path.write_bytes(content + b"x")


def files(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]


def damaged_copies(saved: Path, kind: str, how: str, tmp_path: Path) -> Iterator[Path]:
    """Copies of a run in each of which one file of the newest checkpoint of a kind is damaged."""
    generator = random.Random(0)
    for number, name in enumerate(files(saved / "checkpoints" / kind / "3")):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        file = folder / "checkpoints" / kind / "3" / name
        if file.stat().st_size == 0 and how in ("halve", "flip"):
            continue
        damage(file, how, generator)
        yield folder


@pytest.mark.parametrize("how", ["delete", "halve", "flip", "append"])
def test_damaged_newest_checkpoint_is_replaced_by_the_one_before(how: str, saved: Path, tmp_path: Path) -> None:
    for folder in damaged_copies(saved, "newest", how, tmp_path):
        newest = folder / "checkpoints" / "newest"
        reader = Checkpoints(folder)
        if (newest / "3" / "SHA256SUMS").exists():
            with pytest.raises(UserError, match="newest/3 is damaged"):
                reader.restore(STATE)
        assert steps(newest) == [2, 3]  # only the process that trains replaces it
        said: list[str] = []
        checkpoints = Checkpoints(folder, writing=True)
        assert checkpoints.recover(said.append) == 2
        [line] = said
        assert line.startswith(f"note: the checkpoint {newest / '3'} is damaged (")
        assert line.endswith("); continuing from step 2")
        aside = folder / "checkpoints" / "damaged" / "newest_3_1"
        assert aside.is_dir() == (f"; it is kept in {aside})" in line) == ("its digests are missing" not in line)
        state, progress = checkpoints.restore(STATE)
        np.testing.assert_array_equal(state["w"], np.arange(300.0) + 2)
        assert progress == Progress(2, {"batches": 2}, best_step=2)
        # The best parameters of step 3 are those of a validation that is repeated.
        assert (steps(newest), checkpoints.best_step) == ([2], 2)
        checkpoints.close()
    checkpoints = Checkpoints(folder, writing=True)  # the last one is as any other
    checkpoints.recover(pytest.fail)
    checkpoints.save(STATE, replace(progress, step=3))
    checkpoints.save_best(3, STATE)
    checkpoints.close()
    for kind in ("newest", "best"):
        assert steps(folder / "checkpoints" / kind) == [2, 3]


@pytest.mark.parametrize("how", ["delete", "halve", "flip", "append"])
def test_damaged_best_checkpoint_is_found(how: str, saved: Path, tmp_path: Path) -> None:
    best = Path("checkpoints", "best")
    for folder in damaged_copies(saved, "best", how, tmp_path):
        if not (folder / best / "3" / "SHA256SUMS").exists():
            continue  # a checkpoint of an older version has no digests
        checkpoints = Checkpoints(folder)
        with pytest.raises(UserError) as caught:
            checkpoints.restore_best(STATE)
        assert f"{folder / best / '3'} is damaged" in str(caught.value)
        assert f"{folder / best / '2'} is intact: move the damaged folder away" in str(caught.value)
        shutil.move(folder / best / "3", folder / "away")
        checkpoints = Checkpoints(folder)
        assert (checkpoints.step, checkpoints.best_step) == (3, 2)
        np.testing.assert_array_equal(checkpoints.restore_best(STATE)["w"], np.arange(300.0) - 2)


def test_empty_checkpoint_is_damaged(saved: Path, tmp_path: Path) -> None:
    """Orbax skips such a folder and would restore an older one without a word."""
    shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "best" / "3")
    (tmp_path / "run" / "checkpoints" / "best" / "3").mkdir()
    with pytest.raises(UserError, match="best/3"):
        restore_best(tmp_path / "run", STATE)


def test_only_checkpoint_is_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1)
    next((tmp_path / "checkpoints" / "newest" / "1" / "state" / "d").iterdir()).unlink()
    checkpoints = Checkpoints(tmp_path, writing=True)
    with pytest.raises(UserError, match=r"damaged \(.* is missing\); .*--init-from"):
        checkpoints.recover(print)
    checkpoints.close()
    assert steps(tmp_path / "checkpoints" / "newest") == [1]


def test_checkpoint_that_cannot_be_read_is_damaged(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    unreadable = folder / "checkpoints" / "newest" / "3"

    def read(path: Path, *arguments: Any) -> str:
        if unreadable in path.parents:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return file_digest(path, *arguments)

    monkeypatch.setattr("imgcap_jax.files.file_digest", read)
    content = {name: (unreadable / name).read_bytes() for name in files(unreadable)}
    said: list[str] = []
    checkpoints = Checkpoints(folder, writing=True)
    assert checkpoints.recover(said.append) == 2
    checkpoints.close()
    assert "can't be read: Input/output error; it is kept in" in said[0]
    aside = folder / "checkpoints" / "damaged" / "newest_3_1"
    assert {name: (aside / name).read_bytes() for name in files(aside)} == content
    assert steps(folder / "checkpoints" / "newest") == [2]


def test_error_while_recovering_is_raised_within_what_all_processes_leave_together(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for step in ("2", "3"):
        next((tmp_path / "checkpoints" / "newest" / step / "state" / "d").iterdir()).write_bytes(b"x")
    met: list[str] = []

    @contextmanager
    def together() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            met.append(str(error))
            raise

    checkpoints = Checkpoints(tmp_path, writing=True)
    with pytest.raises(UserError, match="newest/3 is damaged"):
        checkpoints.recover(print, lambda number: pytest.fail("the other processes would not be here"), together)
    assert len(met) == 1
    checkpoints.close()
    # An incomplete one is not taken for that of an older version.
    (tmp_path / "checkpoints" / "newest" / "3" / "SHA256SUMS").unlink()
    again = Checkpoints(tmp_path, writing=True)
    with pytest.raises(UserError, match="newest/2 is damaged"):
        again.recover(print)
    again.close()


def test_checkpoint_without_digests_is_read(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    for path in (tmp_path / "run").rglob("SHA256SUMS"):
        path.unlink()
    np.testing.assert_array_equal(restore_best(tmp_path / "run", STATE)[0]["w"], np.arange(300.0) - 3)


def test_files_of_file_managers_are_no_damage(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "best" / "3" / ".DS_Store").write_text("x")
    restore_best(tmp_path / "run", STATE)


def test_run_of_an_older_version_is_continued(saved: Path, tmp_path: Path) -> None:
    """Without digests, and without the fields that its progress lacks."""
    shutil.copytree(saved, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "newest"
    for path in (tmp_path / "run").rglob("SHA256SUMS"):
        path.unlink()
    (newest / "3" / "validated.json").unlink()
    old = {"step": 3, "data": {"batches": 3}, "best": 0.5, "best_step": 3, "misses": 1}
    (newest / "3" / "progress" / "metadata").write_text(json.dumps({"json": json.dumps(old)}))
    checkpoints = Checkpoints(tmp_path / "run", writing=True)
    assert checkpoints.recover(pytest.fail) == 3
    assert checkpoints.restore(STATE)[1] == Progress(3, {"batches": 3}, best=0.5, best_step=3, misses=1)
    checkpoints.close()
    assert (newest / "3" / "SHA256SUMS").is_file()


def test_validation_is_due_until_its_result_is_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, writing=True)
    checkpoints.save(STATE, Progress(1, {}, validation_due=True))
    checkpoints.save_best(1, STATE)
    checkpoints.wait()
    shutil.copytree(tmp_path, tmp_path / "killed")
    checkpoints.save_validated(Progress(1, {}, best=0.5, best_step=1))
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(STATE)[1] == Progress(1, {}, best=0.5, best_step=1)
    killed = Checkpoints(tmp_path / "killed", writing=True)
    killed.recover(pytest.fail)
    assert killed.restore(STATE)[1] == Progress(1, {}, validation_due=True)
    assert killed.best_step is None  # the validation is repeated
    killed.close()


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path) -> None:
    """The next step writes into the buffers of the state, while the checkpoint is still being written."""
    parallel = DataParallel()
    step = parallel.compile(lambda state, constants, batch: (jax.tree.map(lambda leaf: leaf * 2 + 1, state), {}))
    state = parallel.replicate({"w": jnp.arange(1_000_000.0)})
    batch = parallel.put({"x": np.zeros((4, 1), np.float32)})
    expected = {}
    checkpoints = Checkpoints(tmp_path, writing=True)
    for number in (1, 2, 3):
        expected[number] = np.array(state["w"])
        checkpoints.save_best(number, state)
        checkpoints.save(state, Progress(number, {}))
        before = state["w"]
        for _ in range(3):
            state, _ = step(state, {}, batch)
        assert before.is_deleted()
    checkpoints.close()
    for number in (2, 3):
        for kind in ("newest", "best"):
            found = read_arrays(tmp_path / "checkpoints" / kind / str(number), {"w": state["w"]})
            np.testing.assert_array_equal(found["w"], expected[number])


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it writes is complete only with its digests; the best parameters come before what refers to them."""
    written, proceed = list[tuple[str, int]](), threading.Event()
    write = Writer.write

    def slow(writer: Writer, step: int, *arguments: Any) -> None:
        assert proceed.wait(60)
        written.append((writer.folder.name, step))
        write(writer, step, *arguments)

    monkeypatch.setattr(Writer, "write", slow)
    checkpoints = Checkpoints(tmp_path, writing=True)
    checkpoints.save_best(1, STATE)
    checkpoints.save(STATE, Progress(1, {}, best_step=1))
    assert (checkpoints.step, checkpoints.best_step, checkpoints.idle_seconds) == (1, 1, 0.0)
    assert not list(tmp_path.rglob("SHA256SUMS"))
    checkpoints.check()
    proceed.set()
    checkpoints.wait()
    assert written == [("best", 1), ("newest", 1)]
    assert checkpoints.idle_seconds > 0
    checkpoints.close()
    assert Checkpoints(tmp_path, writing=True).recover(pytest.fail) == 1


def test_failed_write_is_reported_later_and_the_earlier_checkpoint_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def fail(folder: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = Checkpoints(tmp_path, writing=True)
    checkpoints.recover(pytest.fail)
    monkeypatch.setattr("imgcap_jax.training.checkpoints.write_digests", fail)
    checkpoints.save_best(2, STATE)
    checkpoints.save(STATE, Progress(2, {}, best_step=2))  # refers to the best parameters, so it is not written
    assert isinstance(checkpoints.drain(), UserError)
    with pytest.raises(UserError, match=r"earlier checkpoints are intact\): the disk is full"):
        checkpoints.check()
    checkpoints.close()
    assert steps(tmp_path / "checkpoints" / "newest") == [1]
    monkeypatch.undo()
    again = Checkpoints(tmp_path, writing=True)
    assert (again.recover(pytest.fail), again.best_step) == (1, 1)
    again.close()


def test_state_of_four_devices_is_restored_on_other_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, writing=True)
    cut = DataParallel("shard_map").put({"w": np.arange(300.0, dtype=np.float32)})["w"]
    assert not cut.is_fully_replicated
    checkpoints.save({**DataParallel().replicate(STATE), "w": cut}, Progress(1, {}))
    checkpoints.close()
    for count in (1, 2, 3):
        template = DataParallel(devices=jax.devices()[-count:]).replicate(jax.eval_shape(lambda: STATE))
        restored, _ = Checkpoints(tmp_path).restore(template)
        for name, leaf in STATE.items():
            jax.tree.map(np.testing.assert_array_equal, restored[name], leaf)
        assert restored["w"].sharding == template["w"].sharding
        assert restored["w"].devices() == set(jax.devices()[-count:])


def test_resuming_checks_the_best_parameters_too(saved: Path, tmp_path: Path) -> None:
    """They could remain the best ones until the end."""
    shutil.copytree(saved, tmp_path / "run")
    next((tmp_path / "run" / "checkpoints" / "best" / "3" / "default" / "d").iterdir()).write_bytes(b"x")
    checkpoints = Checkpoints(tmp_path / "run", writing=True)
    with pytest.raises(UserError, match="best/3 is damaged"):
        checkpoints.recover(pytest.fail)
    checkpoints.close()


def test_folder_of_temporary_files_must_not_be_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp[1]").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp[1]"))
    with pytest.raises(UserError, match="set TMPDIR"):
        save(tmp_path / "a[1]", 1)


def test_other_shape_is_not_called_damaged(saved: Path) -> None:
    with pytest.raises(UserError, match="does not fit this experiment"):
        restore_best(saved, {**STATE, "w": jnp.zeros(5)})
    with pytest.raises(UserError, match="does not fit this experiment"):
        restore_best(saved, {**STATE, "more": jnp.zeros(5)})
