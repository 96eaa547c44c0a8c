"""Checkpoints: odd folder names, damaged files, and which of them are kept."""

import random
import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from imgcap_jax.errors import UserError
from imgcap_jax.training.checkpoints import Checkpoints, Progress, restore_best

STATE = {"w": jnp.arange(300.0), "b": {"c": jnp.ones((2, 2))}}


def save(folder: Path, *steps: int) -> None:
    checkpoints = Checkpoints(folder, writing=True)
    for step in steps:
        checkpoints.save({**STATE, "w": STATE["w"] + step}, Progress(step, {"batches": step}))
        checkpoints.save_best(step, {**STATE, "w": STATE["w"] - step})
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
    assert progress == Progress(2, {"batches": 2})
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


@pytest.mark.parametrize("how", ["delete", "halve", "flip", "append"])
@pytest.mark.parametrize("kind", ["newest", "best"])
def test_every_damaged_file_is_found(kind: str, how: str, saved: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    step = Path("checkpoints", kind, "3")
    names = [path.relative_to(saved) for path in sorted((saved / step).rglob("*")) if path.is_file()]
    # Damaged digests are found too, except if all of them are gone: then the checkpoint is one without digests.
    for number, name in enumerate(name for name in names if name.name != "SHA256SUMS" or how != "delete"):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        if (folder / name).stat().st_size == 0 and how in ("halve", "flip"):
            continue
        damage(folder / name, how, generator)
        checkpoints = Checkpoints(folder)
        with pytest.raises(UserError) as caught:
            checkpoints.restore(STATE) if kind == "newest" else checkpoints.restore_best(STATE)
        checkpoints.close()
        message = str(caught.value)
        assert f"{folder / step} is damaged" in message, name
        assert f"{folder / step.with_name('2')} is intact: move the damaged folder away" in message
        shutil.move(folder / step, tmp_path / f"away_{number}")
        checkpoints = Checkpoints(folder)
        assert (checkpoints.step, checkpoints.best_step) == ((2, 3) if kind == "newest" else (3, 2))
        restored = checkpoints.restore(STATE)[0] if kind == "newest" else checkpoints.restore_best(STATE)
        checkpoints.close()
        np.testing.assert_array_equal(restored["w"], np.arange(300.0) + (2 if kind == "newest" else -2))


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
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"damaged \(.* is missing\); .*--init-from"):
        checkpoints.restore(STATE)
    checkpoints.close()


def test_checkpoint_without_digests_is_read(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    for path in (tmp_path / "run").rglob("SHA256SUMS"):
        path.unlink()
    np.testing.assert_array_equal(restore_best(tmp_path / "run", STATE)[0]["w"], np.arange(300.0) - 3)


def test_files_of_file_managers_are_no_damage(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "best" / "3" / ".DS_Store").write_text("x")
    restore_best(tmp_path / "run", STATE)


def test_checkpoint_that_was_killed_before_its_digests_gets_them(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    for kind in ("newest", "best"):
        (tmp_path / "run" / "checkpoints" / kind / "3" / "SHA256SUMS").unlink()
    checkpoints = Checkpoints(tmp_path / "run", writing=True)
    checkpoints.restore(STATE)
    checkpoints.save_best(3, STATE)
    checkpoints.close()
    for kind in ("newest", "best"):
        assert (tmp_path / "run" / "checkpoints" / kind / "3" / "SHA256SUMS").is_file()


def test_resuming_checks_the_best_parameters_too(saved: Path, tmp_path: Path) -> None:
    """They could remain the best ones until the end."""
    shutil.copytree(saved, tmp_path / "run")
    next((tmp_path / "run" / "checkpoints" / "best" / "3" / "default" / "d").iterdir()).write_bytes(b"x")
    checkpoints = Checkpoints(tmp_path / "run", writing=True)
    with pytest.raises(UserError, match="best/3 is damaged"):
        checkpoints.restore(STATE)
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
