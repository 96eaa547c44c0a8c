"""The command line: its output, and that every user error gives one line and exit code 2."""

import contextlib
import errno
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import imgcap_jax
from imgcap_jax.cli.main import main
from imgcap_jax.data.scenes.builder import encode_png
from imgcap_jax.data.scenes.world import draw_scene, sample_scene

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _quiet_environment(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_data))
    monkeypatch.chdir(tmp_path)


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


def test_usage_error_is_one_line(capsys: pytest.CaptureFixture[str], refused: Refused) -> None:
    for arguments, said in (
        (["export", "runs/x"], "FOLDER"),
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
    assert "no experiment" in refused(["train"])


def test_version_is_printed_without_importing_jax(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from imgcap_jax.cli.main import main\n"
        "try: main(['--version'])\n"
        "finally: print('jax' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    line, imported = done.stdout.splitlines()
    assert line == f"imgcap_jax {version('imgcap_jax')} (Python {platform.python_version()}, jax {version('jax')})"
    assert imported == "False"
    assert imgcap_jax.__version__ == version("imgcap_jax")


def test_missing_folder(refused: Refused) -> None:
    line = refused(["data", "prepare", "nowhere/at_all"])
    assert "nowhere/at_all" in line


def test_too_many_corrupt_images_are_an_error_that_names_them(tmp_path: Path, refused: Refused) -> None:
    folder = photo_folder(tmp_path / "photos")
    (folder / "images" / "1.jpg").write_bytes(b"\xff\xd8 not a picture")
    assert "1.jpg" in refused(["data", "prepare", str(folder), "--name", "broken", "--data-dir", "d"])


def test_json_with_a_missing_key(tmp_path: Path, refused: Refused) -> None:
    folder = photo_folder(tmp_path / "photos")
    write(folder, {"images": [{"id": 0, "file_name": "0.jpg"}], "annotations": [{"id": 0, "image_id": 0}]})
    line = refused(["data", "prepare", str(folder), "--name", "keyless", "--data-dir", "d"])
    assert "caption" in line
    assert "captions_train.json" in line


def test_missing_image_file(tmp_path: Path, refused: Refused) -> None:
    folder = photo_folder(tmp_path / "photos")
    (folder / "images" / "2.jpg").unlink()
    assert "2.jpg" in refused(["data", "prepare", str(folder), "--name", "absent", "--data-dir", "d"])


def test_empty_split(tmp_path: Path, refused: Refused) -> None:
    folder = photo_folder(tmp_path / "photos")
    write(folder, {"images": [], "annotations": []})
    line = refused(["data", "prepare", str(folder), "--name", "empty", "--data-dir", "d"])
    assert "captions_train.json" in line


def test_unknown_split(trained: Path, refused: Refused) -> None:
    line = refused(["evaluate", str(trained), "--split", "validation"])
    assert "no split 'validation'; it has train, val, test, test_compositional; did you mean val?" in line
    assert "it has train, val, test, test_compositional" in refused(["evaluate", str(trained), "--split", "minival"])


def test_unknown_override_suggests_the_nearest(tiny_file: Path, refused: Refused) -> None:
    line = refused(["train", str(tiny_file), "--decoder.hiden-size", "9"])
    assert "--decoder.hiden-size" in line
    assert "did you mean --decoder.hidden-size?" in line


def test_unknown_option_suggests_the_nearest(trained: Path, refused: Refused) -> None:
    assert "did you mean --length-norm?" in refused(["evaluate", str(trained), "--lenght-norm", "1"])


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
def test_number_out_of_range(tiny_file: Path, refused: Refused, option: list[str]) -> None:
    assert refused(["train", str(tiny_file), *option]).startswith(f"imgcap: {option[0]} is {option[1]}")


def test_small_folder_is_inspected_with_a_lower_min_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    folder = photo_folder(tmp_path / "photos")
    assert main(["data", "prepare", str(folder), "--name", "few", "--data-dir", "d", "--source-note", "my camera"]) == 0
    assert "--min-count is 0; it must be at least 1" in refused(["data", "inspect", "few", "--min-count", "0"])
    assert main(["data", "inspect", "few", "--data-dir", "d", "--min-count", "1"]) == 0
    printed = capsys.readouterr().out
    assert "my camera" in printed
    assert (tmp_path / "few.png").stat().st_size > 1000


def test_scenes_of_another_size_under_another_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    sizes = ["--train-scenes", "4", "--data-dir", "d"]
    assert main(["data", "prepare", "scenes", "--name", "few_scenes", *sizes]) == 0
    assert "few_scenes: train 4" in capsys.readouterr().out
    assert "lower-case letters" in refused(["data", "prepare", "scenes", "--name", "coco", *sizes])
    line = refused(["data", "prepare", "scenes", "--train-scenes", "0"])
    assert line == "imgcap: --train-scenes is 0; it must be at least 1 and at most 9999999"


def test_override_of_the_wrong_type(tiny_file: Path, refused: Refused) -> None:
    line = refused(["train", str(tiny_file), "--decoder.hidden-size", "many"])
    assert "--decoder.hidden-size" in line
    assert "'many'" in line


def test_unknown_experiment_lists_the_known_ones(refused: Refused) -> None:
    assert "scenes_demo" in refused(["train", "scene"])


def test_run_of_another_experiment(trained: Path, tiny_file: Path, refused: Refused) -> None:
    line = refused(["train", str(tiny_file), "--run", str(trained), "--decoder.dropout", "0.2"])
    assert "decoder.dropout: 0.3 -> 0.2" in line


def test_run_can_be_resumed_with_another_number_of_threads(trained: Path, tiny_file: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")  # resuming writes the experiment
    assert main(["train", str(tiny_file), "--run", str(run), "--data.threads", "1"]) == 0


def test_checkpoint_of_another_experiment(trained: Path, tmp_path: Path, refused: Refused) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(trained, changed)
    text = (changed / "experiment.json").read_text()
    (changed / "experiment.json").write_text(text.replace('"hidden_size": 8', '"hidden_size": 16'))
    line = refused(["evaluate", str(changed)])
    assert "does not fit" in line


def test_folder_that_is_not_a_run(tmp_path: Path, refused: Refused) -> None:
    assert "experiment.json" in refused(["evaluate", str(tmp_path)])


def test_an_experiment_in_place_of_its_run(trained: Path, tmp_path: Path, refused: Refused) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(encode_png(draw_scene(sample_scene("test", 0), 64)))
    (tmp_path / "flickr8k").mkdir()  # such as the folder of photos
    for command in (["evaluate"], ["caption", str(photo), "--run"]):
        for name in ("flickr8k", "runs/flickr8k"):
            assert f"imgcap: {name} is not a run; train the experiment first: imgcap train flickr8k" == refused(
                [*command, name]
            )
        assert "train the experiment first: imgcap train my.py" in refused([*command, "my.py"])
    shutil.copytree(trained, "runs/flickr8k")
    shutil.copytree(trained, "runs/my")
    for name, run in (("my.py", "runs/my"), ("my", "runs/my")):
        assert f"{name} does not exist; did you mean {run}?" in refused(["evaluate", name])
    is_no_run = "is not a run (it has no experiment.json)"
    assert f"flickr8k {is_no_run}; did you mean runs/flickr8k?" in refused(["evaluate", "flickr8k"])
    assert "other does not exist; give a folder that training wrote" in refused(["evaluate", "other"])
    Path("other").mkdir()
    assert f"other {is_no_run}; give a folder that training wrote" in refused(["evaluate", "other"])


def test_full_disk_while_saving_keeps_the_previous_checkpoint(
    tiny_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import orbax.checkpoint as ocp

    original, saves = ocp.CheckpointManager.save, []

    def full(self: object, *arguments: object, **options: object) -> object:
        saves.append(1)
        if len(saves) > 4:  # those of step 0 to 3
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *arguments, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    command = ["train", str(tiny_file), "--run", str(tmp_path / "run")]
    assert "the disk is full" in refused(command)
    steps = [int(p.name) for p in (tmp_path / "run" / "checkpoints" / "newest").iterdir() if p.name.isdigit()]
    assert max(steps) == 3
    monkeypatch.setattr(ocp.CheckpointManager, "save", original)
    assert main(command) == 0
    assert "at step 3 of 10" in capsys.readouterr().out


@pytest.mark.slow
def test_full_file_system(
    tiny_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
) -> None:
    """The same with a small file system that is full after the third checkpoint. Orbax prints nothing."""
    from imgcap_jax.training.checkpoints import Checkpoints

    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True)
    if mount.returncode:
        pytest.skip("no permission to mount a file system")
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
        # The fourth checkpoint also fits if an older one has already been deleted, in the background.
        assert re.search("at step [23] of 10", capfd.readouterr().out)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_error_of_a_loss_that_is_not_finite_names_the_step(tiny_file: Path, tmp_path: Path, refused: Refused) -> None:
    options = ["--optimizer.learning-rate", "1e30", "--optimizer.warmup-epochs", "0"]
    line = refused(["train", str(tiny_file), "--run", str(tmp_path / "run"), *options])
    assert "at step" in line
    assert "--optimizer.learning-rate" in line


def test_evaluate_writes_coco_results_and_truth_scores(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["evaluate", str(trained), "--split", "test", "--beam", "3", "--page", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "CIDEr-D" in printed
    assert "beam 3" in printed
    results = json.loads((trained / "captions_test.json").read_text())
    assert len(results) == 12
    assert set(results[0]) == {"image_id", "file_name", "caption"}
    scores = json.loads((trained / "scores_test.json").read_text())
    assert scores["decoding"]["beam"] == 3
    assert 0 <= scores["truth"]["true"] <= 1
    text = page.read_text()
    assert text.count("<figure") == 10
    for part in (f"<dd>{trained} (cross-entropy, best parameters of step ", "scenes, split test", "12; 10 of them are"):
        assert part in text
    for part in ("beam 3, length_norm", "How to read this page", "all 12 images of the split", scores["signature"]):
        assert part in text
    shown = [results[number]["caption"] for number in np.linspace(0, 11, 10).astype(int)]
    assert text.count('class="word"') == sum(len(caption.split()) for caption in shown)


def test_attention_is_not_averaged_over_different_parts_of_an_image(
    trained: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    other, page = tmp_path / "other", tmp_path / "page.html"
    shutil.copytree(trained, other)
    text = (other / "experiment.json").read_text()
    (other / "experiment.json").write_text(text.replace('"resize": "squash"', '"resize": "crop"'))
    ensemble = ["evaluate", str(other), "--ensemble", str(trained), "--split", "val"]
    assert main([*ensemble, "--page", str(page)]) == 0
    assert 'class="word"' not in page.read_text()
    assert "The attention is not shown, because the members of the ensemble" in page.read_text()
    assert "cut to the square" not in page.read_text()
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    command = ["caption", str(tmp_path / "photo.png"), "--run", str(other), "--run", str(trained), "--attention"]
    assert "their data.resize differs" in refused(command)


def test_stopped_smoke_run_starts_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import imgcap_jax.train

    stopped = imgcap_jax.train.Outcome(3, None, 2)
    for option, said in ([], "the same command resumes"), (["--smoke"], "the same command starts again"):
        monkeypatch.setattr(imgcap_jax.train, "train", lambda *_, **__: stopped)
        assert main(["train", "scenes_demo", *option]) == 130
        assert capsys.readouterr().out == f"stopped at step 3; {said}\n"

        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(imgcap_jax.train, "train", interrupt)
        assert main(["train", "scenes_demo", *option]) == 130
        assert capsys.readouterr().err == f"imgcap: interrupted; {said}\n"


def test_caption_reports_unreadable_files_and_captions_the_others(
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


def test_captions_of_a_folder_in_coco_results_format(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "test2014"
    photos.mkdir()
    for number in (16, 7):
        picture = encode_png(draw_scene(sample_scene("test", number), 64))
        (photos / f"COCO_test2014_{number:012}.png").write_bytes(picture)
    (photos / "COCO_test2014_000000000099.jpg").write_bytes(b"no picture")
    output = tmp_path / "results.json"
    command = ["caption", str(photos), "--run", str(trained), "--results"]
    assert main([*command, str(output)]) == 2  # because one image is unreadable
    printed = capsys.readouterr()
    lines = dict(line.split(": ", 1) for line in printed.out.splitlines())
    assert json.loads(output.read_text()) == [
        {"image_id": number, "caption": lines[str(photos / f"COCO_test2014_{number:012}.png")]} for number in (7, 16)
    ]
    assert "captioned 2 of 3 photos; left out 1" in printed.err
    (photos / "beach.png").write_bytes(b"")
    assert main([*command, str(output)]) == 2
    assert "results.json exists; --overwrite replaces it" in capsys.readouterr().err
    command = [*command[:-1], "--overwrite", "--results"]
    assert main([*command, str(output)]) == 2
    assert "does not end in an image id" in capsys.readouterr().err
    (photos / "beach.png").rename(photos / "beach_7.png")
    assert main([*command, str(output)]) == 2
    assert "are both image 7" in capsys.readouterr().err
    (photos / "beach_7.png").unlink()
    assert main([*command, str(output / "results.json")]) == 2  # in a file
    assert "results.json can't be written" in capsys.readouterr().err
    assert len(json.loads(output.read_text())) == 2  # the existing file is unchanged


def test_captioner_takes_paths_bytes_arrays_and_images(trained: Path, tmp_path: Path) -> None:
    from imgcap_jax.captioner import Captioner

    pixels = draw_scene(sample_scene("test", 0), 32)
    encoded = encode_png(pixels)
    path = tmp_path / "scene.png"
    path.write_bytes(encoded)
    captioner = Captioner.load(trained)
    texts = {caption.text for caption in captioner([path, str(path), encoded, pixels, Image.open(io.BytesIO(encoded))])}
    assert len(texts) == 1


def test_init_from_copies_parameters_and_maps_words(
    trained: Path, tiny_file: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The vocabularies differ in words and order. Words in both keep their parameters."""
    import jax
    from flax import nnx

    from imgcap_jax.data.vocabulary import Vocabulary
    from imgcap_jax.models.model import split_trained
    from imgcap_jax.run.folder import Run
    from imgcap_jax.run.transfer import transfer
    from imgcap_jax.training.checkpoints import Checkpoints

    old = Run.load(trained)
    words = (*old.vocabulary.words[:4], "unheard", *reversed(old.vocabulary.words[4:20]))
    vocabulary = Vocabulary(words, (0,) * len(words))
    run = Run(tmp_path, old.experiment, vocabulary)
    fresh = np.asarray(run.model(with_encoder=True).decoder.embedding.embedding[...])
    model, line = transfer(trained, run, with_encoder=True)
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


@pytest.fixture
def compilation_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str | None]]:
    """Reads JAX's setting, which starts as that of a new process without $JAX_COMPILATION_CACHE_DIR."""
    import jax

    before = jax.config.values["jax_compilation_cache_dir"]
    seconds = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def test_all_programs_are_kept_until_they_are_too_large(
    tmp_path: Path, compilation_cache: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ones that were not used for the longest time are deleted. Other files stay."""
    import jax

    from imgcap_jax.cli import main as module

    folder = tmp_path / "xla"
    folder.mkdir(mode=0o700)
    for age, name in enumerate(["new-cache", "old-cache", "older-cache", "used-cache", "oldest"]):
        (folder / name).write_bytes(bytes(10))
        os.utime(folder / name, (1e9 if name == "used-cache" else 1e9 - age, 1e9 - age))  # read, written
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_COMPILED_BYTES", 20)
    module._keep_compiled()
    assert {path.name for path in folder.iterdir()} == {"new-cache", "used-cache", "oldest", "looked"}
    (folder / "more-cache").write_bytes(bytes(10))
    module._keep_compiled()
    assert len(list(folder.iterdir())) == 5  # it looks once per day
    os.utime(folder / "looked", (0, time.time() - 90_000))
    module._keep_compiled()
    assert len(list(folder.iterdir())) == 4
    assert (folder / "more-cache").exists()
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0


def test_compiled_programs_are_not_read_from_next_to_a_run(
    trained: Path, tmp_path: Path, compilation_cache: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are machine code, and the run can be that of somebody else."""
    theirs = tmp_path / "theirs"
    shutil.copytree(trained, theirs / "run")
    (theirs / ".cache" / "xla").mkdir(parents=True)
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "own"))
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32)).save(photo)
    assert main(["caption", str(photo), "--run", str(theirs / "run")]) == 0
    assert compilation_cache() == str(tmp_path / "own" / "xla")
    assert (tmp_path / "own" / "xla").stat().st_mode & 0o077 == 0


def test_cache_that_others_can_write_is_not_used(
    trained: Path,
    tmp_path: Path,
    compilation_cache: Callable[[], str | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path))
    (tmp_path / "xla").mkdir()
    (tmp_path / "xla").chmod(0o777)
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32)).save(photo)
    assert main(["caption", str(photo), "--run", str(trained)]) == 0
    assert compilation_cache() is None
    assert f"chmod 700 {tmp_path / 'xla'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "scenes_demo", "--run", "http://host/run"],
        ["train", "scenes_demo", "--cache", "http://host/cache"],
        ["train", "scenes_demo", "--init-from", "http://host/run"],
        ["evaluate", "http://host/run"],
        ["caption", "photo.jpg", "--run", "ftp://host/run"],
        ["data", "prepare", "scenes", "--data-dir", "http://host/data"],
    ],
)
def test_urls_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "only local folders and gs://, s3://, az:// work" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_url_of_the_datasets_is_refused(refused: Refused, tmp_path: Path, tiny_file: Path) -> None:
    command = ["train", str(tiny_file), "--run", str(tmp_path / "run"), "--data.data-dir", "http://host/data"]
    assert "only local folders and gs://, s3://, az:// work" in refused(command)


def test_negative_seed_is_refused(refused: Refused, tiny_file: Path, tmp_path: Path) -> None:
    command = ["train", str(tiny_file), "--run", str(tmp_path / "run"), "--training.seed", "-1"]
    assert "--training.seed is -1; it must be at least 0 and" in refused(command)


def test_links_in_a_run_are_replaced_by_evaluate(trained: Path, tmp_path: Path) -> None:
    run, victim = Path(shutil.copytree(trained, tmp_path / "run")), tmp_path / "victim"
    victim.write_text("mine")
    for name in ("captions_val.json", "scores_val.json", "references_val.json"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(victim)
    assert main(["evaluate", str(run), "--cache", str(tmp_path / "cache")]) == 0
    assert victim.read_text() == "mine"
    names = {entry["image_id"]: entry["file_name"] for entry in json.loads((run / "captions_val.json").read_text())}
    images = json.loads((run / "references_val.json").read_text())["images"]
    assert names == {image["id"]: image["file_name"] for image in images}
    assert all(name.startswith("val_") for name in names.values())


def test_damaged_results_of_sweeps_are_kept(trained: Path, tmp_path: Path, refused: Refused) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "sweep_val.json").write_text("[{")
    assert "sweep_val.json is damaged" in refused(["evaluate", str(run), "--decode.beam", "1", "2"])
    assert (run / "sweep_val.json").read_text() == "[{"
