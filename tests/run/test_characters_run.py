"""A run on Chinese captions in characters: training, evaluation, captioning, and what it cannot be mixed with."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.captioner import Captioner
from imgcap_jax.cli.main import main
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.run.folder import Run
from imgcap_jax.tokenizers import Characters

COLOURS = {"红色": (220, 30, 30), "绿色": (30, 220, 30), "蓝色": (30, 30, 220)}
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def place(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of plain colours, and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("chinese")
    photos = folder / "photos"
    photos.mkdir()
    lines = []
    for number in range(36):
        name, colour = list(COLOURS.items())[number % 3]
        pixels = np.clip(np.random.default_rng(number).normal(colour, 12, (32, 32, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(photos / f"{number}.png")
        split = "train" if number < 24 else "val"
        captions = [f"一个{name}的方块。", f"这是{name}的", f"{name}，方块"]
        lines.append({"image": f"{number}.png", "captions": captions, "split": split})
    (photos / "list.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    shared = ["--data-dir", str(folder / "data")]
    assert main(["data", "prepare", str(photos), "--name", "chinese", *shared]) == 0
    options = ["--data.dataset", "chinese", "--data.data-dir", str(folder / "data")]
    options += ["--data.tokenizer", "characters", "--training.epochs", "20", "--optimizer.learning-rate", "0.02"]
    options += ["--training.checkpoint-minutes", "9", "--training.log-steps", "60"]
    options += ["--training.evaluate-epochs", "20", "--decoder.dropout", "0", "--objective.label-smoothing", "0"]
    command = ["train", str(tiny_file), "--run", str(folder / "run"), "--cache", str(folder / "cache"), *options]
    assert main(command) == 0
    assert main(command) == 0  # resumes the finished run
    return folder


def test_vocabulary_scores_and_captions_are_in_characters(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.load(place / "run")
    assert run.vocabulary.tokenizer == run.experiment.data.tokenizer == Characters()
    assert set(run.vocabulary.words[4:]) == set("一个红绿蓝色的方块这是")
    cache = ["--cache", str(place / "cache")]
    assert main(["evaluate", str(place / "run"), *cache]) == 0
    shown = capsys.readouterr().out
    assert "METEOR is missing: METEOR is defined for the words of English captions" in shown
    document = json.loads((place / "run" / "scores_val.json").read_text())
    assert "|tok:characters|" in document["signature"]
    captions = json.loads((place / "run" / "captions_val.json").read_text())
    assert not any(" " in entry["caption"] for entry in captions)
    # The scores of the files are those of the evaluation.
    files = [str(place / "run" / name) for name in ("captions_val.json", "references_val.json")]
    assert main(["score", *files, "--tokenizer", "characters", "--json", str(place / "scores.json")]) == 0
    scores = json.loads((place / "scores.json").read_text())["scores"]
    assert scores["CIDEr-D"] == pytest.approx(document["scores"]["CIDEr-D"], abs=1e-5)
    assert scores["CIDEr-D"] > 1  # the colours are told apart


def test_words_of_decoding_settings_are_characters(place: Path, refused: Refused) -> None:
    photo = place / "photos" / "0.png"
    (caption,) = Captioner.load(place / "run", decoding=Decoding(beam=2, prefix="这是红"))([photo])
    assert caption.words[:3] == ("这", "是", "红")
    assert caption.text == "".join(caption.words)
    assert len(caption.words) == len(caption.log_probs)
    command = ["caption", str(photo), "--run", str(place / "run")]
    assert main([*command, "--decode.must", "蓝|绿"]) == 0
    assert "'蓝色' is not a single word of the model's tokenizer (characters)" in refused(
        [*command, "--decode.must", "蓝色"]
    )
    assert "lacks the word '狗'" in refused([*command, "--decode.prefix", "狗"])
    for rule in ("forbid_bad_endings", "forbid_repeated_words"):
        option = "--decode." + rule.replace("_", "-")
        assert f"{rule} has no effect" in refused([*command, option, "true"])


def test_runs_of_other_tokenizers_are_not_mixed_with_it(
    place: Path, trained: Path, tiny_file: Path, tmp_path: Path, refused: Refused
) -> None:
    run = str(place / "run")
    line = refused(["evaluate", run, "--ensemble", str(trained)])
    assert "different tokenizers (ptb-coco, characters)" in line
    options = ["--data.dataset", "chinese", "--data.data-dir", str(place / "data")]
    command = ["train", str(tiny_file), *options, "--cache", str(tmp_path)]
    line = refused([*command, "--run", str(tmp_path / "new"), "--init-from", run])
    assert "the run to start from has another tokenizer (characters, here ptb-coco)" in line
    assert not (tmp_path / "new" / "experiment.json").exists()
    assert "contains another experiment" in refused([*command, "--run", run])
    path = tmp_path / "copy"
    path.mkdir()
    for name in ("experiment.json", "vocabulary.json"):
        (path / name).write_text(
            (place / "run" / name)
            .read_text()
            .replace("imgcap_jax.tokenizers:Characters", "imgcap_jax.tokenizers:PennTreebank")
        )
    assert "was built with the tokenizer 'characters'" in refused(["evaluate", str(path)])
