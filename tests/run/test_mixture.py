"""Training on a mixture and from the parameters of another run, on the command line."""

import json
from pathlib import Path

import pytest
from PIL import Image

from imgcap_jax.cli.main import main
from imgcap_jax.data.scenes.language import scene_captions
from imgcap_jax.data.scenes.world import draw_scene, sample_scene


@pytest.mark.slow
def test_mixture_then_fine_tuning_on_a_custom_folder(
    tiny_data: Path,
    tiny_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_data))
    photos = tmp_path / "mine"
    photos.mkdir()
    lines = []
    for i in range(16):
        scene = sample_scene("train", 900 + i)
        Image.fromarray(draw_scene(scene, 40)).save(photos / f"{i}.jpg")
        captions = [f"unheard {caption}" for caption in scene_captions(scene)]
        lines.append({"image": f"{i}.jpg", "captions": captions, "split": "val" if i > 11 else "train"})
    (photos / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["data", "prepare", str(photos), "--name", "mine_of_the_test"]) == 0

    shared = ["--cache", str(tmp_path / "cache"), "--training.epochs", "1"]
    mixed = tmp_path / "mixed"
    command = ["train", str(tiny_file), "--run", str(mixed), *shared]
    assert main([*command, "--data.dataset", "scenes*2+mine_of_the_test"]) == 0
    assert "unheard" in json.loads((mixed / "vocabulary.json").read_text())["words"]
    shown = capsys.readouterr().out
    assert "52 training images" in shown
    # Each scene twice and each photo once; an epoch is 92 images in batches of 8.
    expected = "an epoch has 92 images: scenes 40 images x 2 (87.0%), mine_of_the_test 12 images x 1 (13.0%)"
    assert expected in shown.splitlines()
    assert "12 steps of" in shown

    tuned = tmp_path / "tuned"
    command = ["train", str(tiny_file), "--run", str(tuned), *shared, "--init-from", str(mixed)]
    assert main([*command, "--data.dataset", "mine_of_the_test"]) == 0
    words = len(json.loads((tuned / "vocabulary.json").read_text())["words"])
    assert f"starting from {mixed}: {words} of {words} words are in its vocabulary" in capsys.readouterr().out
