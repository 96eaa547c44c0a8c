"""The command line as a user meets it: what it prints, and that mistakes cost one line and exit code 2."""

import contextlib
import errno
import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.cli import main
from imgcap_jax.data.builders.scenes import encode_png
from imgcap_jax.data.scenes import draw_scene, sample_scene


@pytest.fixture(autouse=True)
def _quiet_environment(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_data))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny experiment."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = ["train", str(tiny_file), "--run", str(folder / "run"), "--cache", str(folder / "cache")]
    assert main([*arguments, "--data.data-dir", str(tiny_data)]) == 0
    return folder / "run"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that has to fail with one line and exit code 2; gives the line."""
    capsys.readouterr()
    assert main(arguments) == 2
    # A progress bar that was under way stays above the line.
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "━" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("imgcap: ")
    return lines[0]


def photo_folder(folder: Path, count: int = 3) -> Path:
    """A folder of pictures in COCO's layout."""
    (folder / "images").mkdir(parents=True)
    images = []
    for i in range(count):
        Image.fromarray(draw_scene(sample_scene("train", i), 48)).save(folder / "images" / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg"})
    annotations = [{"id": i, "image_id": i, "caption": "a drawing of shapes"} for i in range(count)]
    write(folder, {"images": images, "annotations": annotations})
    return folder


def write(folder: Path, content: object) -> None:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "captions_train.json").write_text(json.dumps(content))


def test_usage_mistake_costs_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["caption", "photo.jpg"], "--run"),
        (["evaluate", "run", "--beam", "many"], "many"),
        (["trian"], "trian"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("imgcap: ")
        assert error.count("\n") == 1
        assert said in error
    assert "give an experiment" in refused(["train"], capsys)


def test_missing_folder(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["data", "prepare", "nowhere/at_all"], capsys)
    assert "nowhere/at_all" in line


def test_corrupt_jpeg_is_listed_and_above_one_percent_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photo_folder(tmp_path / "photos")
    (folder / "images" / "1.jpg").write_bytes(b"\xff\xd8 not a picture")
    assert "1.jpg" in refused(["data", "prepare", str(folder), "--name", "broken", "--data-dir", "d"], capsys)


def test_json_with_a_missing_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photo_folder(tmp_path / "photos")
    write(folder, {"images": [{"id": 0, "file_name": "0.jpg"}], "annotations": [{"id": 0, "image_id": 0}]})
    line = refused(["data", "prepare", str(folder), "--name", "keyless", "--data-dir", "d"], capsys)
    assert "caption" in line
    assert "captions_train.json" in line


def test_listed_image_that_is_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photo_folder(tmp_path / "photos")
    (folder / "images" / "2.jpg").unlink()
    assert "2.jpg" in refused(["data", "prepare", str(folder), "--name", "absent", "--data-dir", "d"], capsys)


def test_split_that_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photo_folder(tmp_path / "photos")
    write(folder, {"images": [], "annotations": []})
    line = refused(["data", "prepare", str(folder), "--name", "empty", "--data-dir", "d"], capsys)
    assert "captions_train.json" in line


def test_split_that_does_not_exist(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["evaluate", str(trained), "--split", "dev"], capsys)
    assert "dev" in line
    assert "val" in line


def test_unknown_override_names_the_nearest(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["train", str(tiny_file), "--decoder.hiden-size", "9"], capsys)
    assert "--decoder.hiden-size" in line
    assert "did you mean --decoder.hidden-size?" in line


def test_unknown_option_of_another_command_names_the_nearest(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean --length-norm?" in refused(["evaluate", str(trained), "--lenght-norm", "1"], capsys)


@pytest.mark.parametrize(
    "option",
    [
        ["--data.batch-size", "0"],
        ["--data.max-words", "0"],
        ["--decoder.dropout", "1"],
        ["--decoder.hidden-size", "0"],
        ["--objective.label-smoothing", "1"],
    ],
)
def test_number_that_makes_no_sense(tiny_file: Path, capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    name = option[0].removeprefix("--").split(".")[1].replace("-", "_")
    assert name in refused(["train", str(tiny_file), *option], capsys)


def test_small_folder_is_inspected_with_a_lower_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photo_folder(tmp_path / "photos")
    assert main(["data", "prepare", str(folder), "--name", "few", "--data-dir", "d", "--source-note", "my camera"]) == 0
    assert "min-count" in refused(["data", "inspect", "few", "--data-dir", "d"], capsys)
    assert main(["data", "inspect", "few", "--data-dir", "d", "--min-count", "1"]) == 0
    printed = capsys.readouterr().out
    assert "my camera" in printed
    assert (tmp_path / "few.png").stat().st_size > 1000


def test_scenes_of_another_size_under_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--train-scenes", "4", "--data-dir", "d"]
    assert main(["data", "prepare", "scenes", "--name", "few_scenes", *sizes]) == 0
    assert "few_scenes: train 4" in capsys.readouterr().out
    assert "small letters" in refused(["data", "prepare", "scenes", "--name", "coco", *sizes], capsys)


def test_override_of_the_wrong_type(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["train", str(tiny_file), "--decoder.hidden-size", "many"], capsys)
    assert "--decoder.hidden-size" in line
    assert "'many'" in line


def test_unknown_experiment_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert "scenes_demo" in refused(["train", "scene"], capsys)


def test_run_of_another_experiment(trained: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["train", str(tiny_file), "--run", str(trained), "--decoder.dropout", "0.2"], capsys)
    assert "decoder.dropout: 0.3 -> 0.2" in line


def test_run_may_be_resumed_with_another_number_of_threads(trained: Path, tiny_file: Path) -> None:
    assert main(["train", str(tiny_file), "--run", str(trained), "--data.threads", "1"]) == 0


def test_checkpoint_of_another_experiment(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(trained, changed)
    text = (changed / "experiment.json").read_text()
    (changed / "experiment.json").write_text(text.replace('"hidden_size": 8', '"hidden_size": 16'))
    line = refused(["evaluate", str(changed)], capsys)
    assert "does not fit" in line


def test_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "experiment.json" in refused(["evaluate", str(tmp_path)], capsys)


def test_disk_full_while_saving_leaves_the_checkpoint_before(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import orbax.checkpoint as ocp

    original, saves = ocp.CheckpointManager.save, []

    def full(self: object, *arguments: object, **options: object) -> object:
        saves.append(1)
        if len(saves) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *arguments, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    command = ["train", str(tiny_file), "--run", str(tmp_path / "run")]
    assert "disk full" in refused(command, capsys)
    steps = [int(p.name) for p in (tmp_path / "run" / "checkpoints" / "newest").iterdir() if p.name.isdigit()]
    assert max(steps) == 3
    monkeypatch.setattr(ocp.CheckpointManager, "save", original)
    assert main(command) == 0
    assert "at step 3 of 10" in capsys.readouterr().out


def test_disk_that_is_really_full(
    tiny_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same on a small file system, which fills up after the third checkpoint: Orbax's own noise as well."""
    from imgcap_jax.training.checkpoints import Checkpoints

    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True)
    if mount.returncode:
        pytest.skip("no right to mount a small file system")
    original, saves = Checkpoints.save, []

    def save(self: Checkpoints, *arguments: Any) -> None:
        original(self, *arguments)
        saves.append(1)
        if len(saves) == 3:
            with (small / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
                while True:
                    filler.write(b"x" * 4096)

    command = ["train", str(tiny_file), "--run", str(small / "run"), "--cache", str(tmp_path / "cache")]
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "save", save)
            line = refused(command, capfd)
        assert "full" in line
        (small / "filler").unlink()
        assert main(command) == 0
        assert "at step 3 of 10" in capfd.readouterr().out
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_loss_that_is_not_finite_stops_with_the_step(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--optimizer.learning-rate", "1e30", "--optimizer.warmup-epochs", "0"]
    line = refused(["train", str(tiny_file), "--run", str(tmp_path / "run"), *options], capsys)
    assert "at step" in line
    assert "--optimizer.learning-rate" in line


def test_evaluate_writes_coco_files_and_the_truth(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["evaluate", str(trained), "--split", "test", "--beam", "3", "--page", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "CIDEr-D" in printed
    assert "beam 3" in printed
    results = json.loads((trained / "captions_test.json").read_text())
    assert len(results) == 12
    assert set(results[0]) == {"image_id", "caption"}
    scores = json.loads((trained / "scores_test.json").read_text())
    assert scores["decoding"]["beam"] == 3
    assert 0 <= scores["truth"]["true"] <= 1
    assert page.read_text().count("<figure") == 10


def test_caption_tells_of_the_bad_file_and_captions_the_others(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(encode_png(draw_scene(sample_scene("test", 0), 64)))
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    assert main(["caption", str(bad), str(good), str(tmp_path / "gone.jpg"), "--run", str(trained), "--json"]) == 2
    printed = capsys.readouterr()
    line = json.loads(printed.out)
    assert line["file"] == str(good)
    assert line["text"] == " ".join(line["words"])
    assert len(line["log_probs"]) == len(line["words"])
    assert str(bad) in printed.err
    assert "gone.jpg" in printed.err


def test_sweep_scores_every_combination_without_touching_the_run_s_own_scores(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained / "scores_val.json").unlink(missing_ok=True)
    options = ["--decode.beam", "1", "2", "--decode.length-norm", "0", "1.0", "--floor"]
    assert main(["evaluate", str(trained), *options]) == 0
    printed = capsys.readouterr().out
    swept = json.loads((trained / "sweep_val.json").read_text())
    assert [(one["decoding"]["beam"], one["decoding"]["length_norm"]) for one in swept] == [
        (1, 0.0),
        (1, 1.0),
        (2, 0.0),
        (2, 1.0),
    ]
    assert swept[0]["scores"] == swept[1]["scores"]  # greedy knows no length norm
    assert 1 <= swept[0]["mean_steps"] <= swept[0]["max_steps"] == 20
    assert "CIDEr-D" in swept[0]["scores_of_other_photos_captions"]
    assert not (trained / "scores_val.json").exists()
    assert len([line for line in printed.splitlines() if "images/s" in line and "decoder steps" in line]) == 4
    head, *rows = printed.splitlines()[-5:]
    assert head.split()[:2] == ["beam", "length-norm"]
    assert [row.split()[:2] for row in rows] == [["1", "0.0"], ["1", "1.0"], ["2", "0.0"], ["2", "1.0"]]


def test_floor_gives_no_image_its_own_caption(trained: Path) -> None:
    from imgcap_jax.data.sources import open_source
    from imgcap_jax.data.vocabulary import Vocabulary
    from imgcap_jax.evaluation import SplitEvaluator
    from imgcap_jax.training.parallel import DataParallel

    source = open_source("scenes", "test", None)
    evaluator = SplitEvaluator([], source, Vocabulary.load(trained / "vocabulary.json"), DataParallel())
    own = {image_id: captions[0] for image_id, captions in evaluator.references.items()}
    dealt: dict[int, str] = {}
    evaluator.score = lambda captions: dealt.update(captions)  # type: ignore[assignment, method-assign, return-value]
    names = {image_id: str(image_id) for image_id in own}
    evaluator.score_of_other_photos(names)
    assert sorted(dealt.values()) == sorted(names.values())
    assert all(str(image_id) != other for image_id, other in dealt.items())


def test_captions_come_with_rivals_scores_and_pictures(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "scene.png").write_bytes(encode_png(draw_scene(sample_scene("test", 0), 64)))
    command = ["caption", "one", "two/scene.png", "--run", str(trained), "--attention", "maps"]
    assert main([*command, "--n-best", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == ["one/scene.png"] * 2 + ["two/scene.png"] * 2
    assert lines[0]["score"] >= lines[1]["score"]
    weights = np.array(lines[0]["attention"])
    assert weights.shape == (len(lines[0]["words"]), 64)  # 8 x 8 regions of 32 pixels
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-3)
    for name in ("scene_attention.png", "scene_2_attention.png"):
        with Image.open(tmp_path / "maps" / name) as picture:
            assert picture.width > 5 * 200
    assert main(["caption", "one", "--run", str(trained), "--decode.samples", "3"]) == 0
    assert capsys.readouterr().out.count("one/scene.png: ") == 3
    line = refused(["caption", "one", "--run", str(trained), "--beam", "2", "--n-best", "3"], capsys)
    assert "n_best is 3, but beam is 2" in line


def test_an_ensemble_of_a_run_with_itself_changes_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(trained), "--split", "test"]) == 0
    assert main(["evaluate", str(trained), "--split", "test", "--ensemble", str(trained)]) == 0
    assert "ensemble of 2" in capsys.readouterr().out
    alone, together = ((trained / name).read_text() for name in ("captions_test.json", "captions_ensemble_test.json"))
    assert alone == together
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    words = json.loads((other / "vocabulary.json").read_text())
    words["words"][5] = "zebra"
    (other / "vocabulary.json").write_text(json.dumps(words))
    assert "different vocabularies" in refused(
        ["caption", str(tmp_path), "--run", str(trained), "--run", str(other)], capsys
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--decode.beem", "3"], "did you mean --decode.beam"),
        (["--decode.prefix", "a zebra"], "doesn't know the word 'zebra'"),
        (["--decode.must", "a,red,blue,green,large"], "at most 4"),
    ],
)
def test_decoding_that_makes_no_sense(
    trained: Path, capsys: pytest.CaptureFixture[str], option: list[str], message: str
) -> None:
    assert message in refused(["evaluate", str(trained), *option], capsys)


def test_captioner_takes_paths_bytes_arrays_and_images(trained: Path, tmp_path: Path) -> None:
    from imgcap_jax.captioner import Captioner

    pixels = draw_scene(sample_scene("test", 0), 32)
    encoded = encode_png(pixels)
    path = tmp_path / "scene.png"
    path.write_bytes(encoded)
    captioner = Captioner.load(trained)
    texts = {caption.text for caption in captioner([path, str(path), encoded, pixels, Image.open(io.BytesIO(encoded))])}
    assert len(texts) == 1


def test_init_from_maps_words_and_starts_where_the_other_ended(
    trained: Path, tiny_file: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A vocabulary of other words in another order: words both know keep their rows."""
    import jax
    from flax import nnx

    from imgcap_jax.data.vocabulary import Vocabulary
    from imgcap_jax.models.model import split_trained
    from imgcap_jax.run import Run
    from imgcap_jax.training.checkpoints import Checkpoints
    from imgcap_jax.training.transfer import transfer

    old = Run.load(trained)
    words = (*old.vocabulary.words[:4], "unheard", *reversed(old.vocabulary.words[4:20]))
    vocabulary = Vocabulary(words, (0,) * len(words))
    model = Run(tmp_path, old.experiment, vocabulary).model(with_encoder=True)
    fresh = np.asarray(model.decoder.embedding.embedding[...])
    line = transfer(trained, model, vocabulary)
    assert f"{len(words) - 1} of {len(words)} words" in line
    _, template, _ = split_trained(old.model(with_encoder=True))
    checkpoints = Checkpoints(trained)
    best = nnx.to_pure_dict(checkpoints.restore_best(template))
    checkpoints.close()
    rows = np.asarray(model.decoder.embedding.embedding[...])
    np.testing.assert_array_equal(rows[5], best["decoder"]["embedding"]["embedding"][19])
    np.testing.assert_array_equal(rows[4], fresh[4])
    kernel = np.asarray(model.decoder.words.kernel[...])
    np.testing.assert_array_equal(kernel[:, 5], best["decoder"]["words"]["kernel"][:, 19])
    gates = np.asarray(model.decoder.lstm.gates.kernel[...])
    np.testing.assert_array_equal(gates, jax.device_get(best["decoder"]["lstm"]["gates"]["kernel"]))
