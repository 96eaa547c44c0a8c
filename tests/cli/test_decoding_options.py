"""Decoding on the command line: sweeps, the floor, ensembles, n-best lists and attention maps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.cli.main import main
from imgcap_jax.cli.sweeps import combinations
from imgcap_jax.data.scenes.builder import encode_png
from imgcap_jax.data.scenes.world import draw_scene, sample_scene
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _quiet_environment(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_data))
    monkeypatch.chdir(tmp_path)


def test_sweep_scores_every_combination_and_keeps_the_scores_of_the_run(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("scores_val.json", "sweep_val.json"):
        (trained / name).unlink(missing_ok=True)
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
    assert swept[0]["scores"] == swept[1]["scores"]  # greedy decoding has no length norm
    assert 1 <= swept[0]["mean_steps"] <= swept[0]["max_steps"] == 20
    assert "CIDEr-D" in swept[0]["scores_of_other_photos_captions"]
    assert not (trained / "scores_val.json").exists()
    # Another sweep adds new combinations.
    assert main(["evaluate", str(trained), "--decode.beam", "2", "3", "--length-norm", "1.0"]) == 0
    again = json.loads((trained / "sweep_val.json").read_text())
    assert [one["decoding"]["beam"] for one in again] == [1, 1, 2, 2, 3]
    lines = printed.splitlines()
    assert len([line for line in lines[:4] if "CIDEr-D" in line]) == 4  # one line per setting
    assert lines[4] == ""
    head, *rows = lines[5:10]
    assert head.split()[:2] == ["beam", "length-norm"]
    assert "floor" in head
    assert [row.split()[:2] for row in rows] == [["1", "0.0"], ["1", "1.0"], ["2", "0.0"], ["2", "1.0"]]
    scores = [one["scores"]["CIDEr-D"] for one in swept]
    marked = [row.endswith("best") for row in rows]
    assert marked == [score == max(scores) and scores.count(score) == 1 for score in scores]
    assert sum("signature" in line for line in lines) == 1
    assert lines[-1] == f"written into {trained}: sweep_val.json"


def test_a_folder_of_runs_is_evaluated_run_by_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    runs = tmp_path / "population"
    for seed in (0, 1):
        shutil.copytree(trained, runs / f"seed={seed}")
        path = runs / f"seed={seed}" / "experiment.json"
        experiment = json.loads(path.read_text())
        experiment["training"]["seed"] = seed
        path.write_text(json.dumps(experiment))
    assert main(["evaluate", str(runs), "--split", "test", "--beam", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["seed=0", "seed=1"]
    head, first, second, mean, deviation = lines[3:8]
    column = head.split().index("CIDEr-D") + 1  # the names have no title
    assert first.split()[1:8] == second.split()[1:8]  # the same parameters
    assert mean.split()[column] == first.split()[column]
    assert deviation.split()[column] == "0.00"
    assert "mean and standard deviation over 2 seeds" in lines
    for seed, line in zip((0, 1), lines[-2:], strict=True):
        names = "captions_test.json, scores_test.json, references_test.json"
        assert line == f"written into {runs / f'seed={seed}'}: {names}"
    assert "--page is for one run" in refused(["evaluate", str(runs), "--page", "x.html"])
    assert "a sweep is for one run" in refused(["evaluate", str(runs), "--decode.beam", "1", "2"])


def test_floor_scores_captions_of_other_images(trained: Path) -> None:
    from imgcap_jax.data.sources import open_source
    from imgcap_jax.data.vocabulary import Vocabulary
    from imgcap_jax.run.evaluation import SplitEvaluator
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


def test_captions_have_n_best_scores_and_attention_maps(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "scene.png").write_bytes(encode_png(draw_scene(sample_scene("test", 0), 64)))
    command = ["caption", "one", "two/scene.png", "--run", str(trained), "--attention", "--attention-dir", "maps"]
    assert main([*command, "--n-best", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == ["one/scene.png"] * 2 + ["two/scene.png"] * 2
    assert [(line["rank"], "picture" in line) for line in lines[:2]] == [(1, True), (2, False)]
    assert lines[0]["score"] >= lines[1]["score"]
    weights = np.array(lines[0]["attention"])
    assert weights.shape == (len(lines[0]["words"]), 64)  # 8 x 8 regions of 32 pixels
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-3)
    for name in ("scene_attention.png", "scene_2_attention.png"):
        with Image.open(tmp_path / "maps" / name) as picture:
            assert picture.width > 5 * 200
    assert main(["caption", "one", "--run", str(trained), "--decode.samples", "3"]) == 0
    assert capsys.readouterr().out.count("one/scene.png: ") == 3
    line = refused(["caption", "one", "--run", str(trained), "--beam", "2", "--n-best", "3"])
    assert "--n-best is 3, but beam is 2" in line


def test_beam_is_raised_to_n_best_unless_it_is_given(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.png").write_bytes(encode_png(draw_scene(sample_scene("test", 0), 64)))
    assert main(["caption", "one.png", "--run", str(trained), "--n-best", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("one.png: ") == 3
    assert printed.err == "imgcap: note: beam raised from 2 to 3, because n-best is 3\n"
    decoding = Decoding(beam=2)
    for options, beams in (
        (["n-best=1", "n-best=5"], [2, 5]),
        (["n-best=5", "groups=2"], [6]),
        (["n-best=2"], [2]),
        (["n-best=2", "beam=4"], [4]),
    ):
        settings, _ = combinations(decoding, [f"--decode.{option}" for option in options])
        assert [one.beam for one in settings] == beams, options
    with pytest.raises(UserError, match=r"--decode\.n-best is 5, but beam is 4; use a smaller n_best or more beams"):
        combinations(decoding, ["--decode.n-best=5", "--decode.beam=4"])


def test_ensemble_of_a_run_with_itself_gives_the_same_captions(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
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
    del words["sha256"]
    (other / "vocabulary.json").write_text(json.dumps(words))
    assert "different vocabularies" in refused(["evaluate", str(trained), "--ensemble", str(other)])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--decode.beem", "3"], "did you mean --decode.beam"),
        (["--max-words", "8", "--decode.max_words", "9"], "are the same option"),
        (["--decode.prefix", "a zebra"], "lacks the word 'zebra'"),
        (["--decode.top-p", "2"], "imgcap: --decode.top-p is 2.0; it must be above 0 and at most 1"),
        (["--beam", "0"], "imgcap: --beam is 0; it must be at least 1"),
        (["--decode.must", "a,red,blue,green,large"], "at most 4"),
    ],
)
def test_invalid_decoding_settings(trained: Path, refused: Refused, option: list[str], message: str) -> None:
    assert message in refused(["evaluate", str(trained), *option])
