"""The page of ``imgcap report``: what it contains, what it reuses, what it says is missing."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax.cli.main import main
from imgcap_jax.report.run_page.captions import choose
from imgcap_jax.report.run_page.charts import nice_ticks
from imgcap_jax.report.run_page.records import axis_of, curves, groups, read_records
from imgcap_jax.report.run_page.words import wording
from imgcap_jax.run.finder import run_folders
from imgcap_jax.run.folder import Run
from imgcap_jax.tokenizers import DEFAULT

Edit = Callable[[Path, Callable[[Any], Any]], None]


def sections(page: str) -> dict[str, str]:
    """The id of each section of the page, and its HTML."""
    parts = re.split(r'<section id="(\w+)"', page)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_page_has_all_sections_and_the_numbers_of_the_run(reported: Path) -> None:
    page = (reported / "report.html").read_text()
    found = sections(page)
    assert list(found) == ["curves", "rewards", "scores", "captions", "truth", "words", "sweeps", "settings"]
    assert [f'href="#{name}"' in page for name in found] == [True] * len(found)
    scores = json.loads((reported / "first" / "scores_test.json").read_text())
    for name, value in scores["scores"].items():
        assert f"<dt>{name}</dt><dd>{100 * value:.1f}</dd>" in page
    assert scores["signature"] in found["scores"]
    assert f"<dt>entirely true</dt><dd>{100 * scores['truth']['true']:.1f} %</dd>" in found["truth"]
    captions = json.loads((reported / "first" / "captions_test.json").read_text())
    assert len(captions) == 12
    assert found["captions"].count('<figure class="shot') == 9
    # Groups are by CIDEr-D, highest first in "Best" and lowest first in "Worst".
    values = [float(value) for value in re.findall(r'<p class="note">CIDEr-D ([\d.]+)</p>', found["captions"])]
    assert values[:3] == sorted(values[:3], reverse=True)
    assert values[6:] == sorted(values[6:])
    assert max(values[3:]) <= values[2]
    assert min(values[:6]) >= values[8]
    # The other runs have the same captions here.
    assert found["captions"].count("<dt>seed_1</dt>") == 9
    assert "Missing on this page" not in page
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)


def test_seeds_are_one_line_with_their_mean_and_deviation(reported: Path) -> None:
    runs = [Run.load(folder) for folder in run_folders(reported)]
    assert [run.folder.name for run in runs] == ["first", "seed_1", "seed_2"]
    found = groups(read_records([(run, reported) for run in runs]))
    assert [(group.name, len(group.records)) for group in found] == [("first", 1), ("pair (2 seeds)", 2)]
    single, pair = curves(found, "validation", "CIDEr-D", 100.0)
    assert single.spread == ()
    assert [x for x, _ in pair.points] == [1.0, 2.0]
    assert [y for _, y in pair.points] == pytest.approx([30.0, 60.0])
    assert list(pair.spread) == pytest.approx([100 * 0.2 / 2**0.5, 100 * 0.4 / 2**0.5])
    settings = sections((reported / "report.html").read_text())["settings"]
    differing = settings.partition("settings in which the runs differ")[2].partition("</table>")[0]
    assert re.findall(r'<th scope="row"[^>]*>([\w.]+)</th>', differing) == ["training.epochs", "training.seed"]
    assert "<td class=t>1, 2</td>" in differing
    over_seeds = sections((reported / "report.html").read_text())["scores"].partition("over seeds")[2]
    assert "± 0.0" in over_seeds  # the same captions


def test_sweep_marks_the_highest_score(reported: Path) -> None:
    sweep = sections((reported / "report.html").read_text())["sweeps"]
    assert "<strong>75.0</strong>" in sweep
    assert "<strong>25.0</strong>" not in sweep
    (plot,) = (json.loads(text.replace("&quot;", '"')) for text in re.findall(r'data-plot="([^"]+)"', sweep))
    assert plot["x"] == "beam"
    assert (plot["lines"][0]["x"], plot["lines"][0]["y"]) == ([1, 3, 5], [25, 75, 50])


def test_stored_captions_are_not_decoded_again(reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from imgcap_jax.run import stored

    monkeypatch.delattr(stored, "evaluate")
    page = tmp_path / "page.html"
    assert main(["report", str(reported / "first"), "--split", "test", "--output", str(page), "--images", "9"]) == 0
    assert page.read_text().count('class="word"') > 3
    assert "rewards" not in sections(page.read_text())


def test_page_without_the_dataset_has_stored_captions_without_photos(
    reported: Path, tmp_path: Path, edited: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(reported / "first", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    edited(tmp_path / "run" / "experiment.json", lambda found: found["data"].update(dataset="elsewhere"))
    page = tmp_path / "page.html"
    command = ["report", str(tmp_path / "run"), "--output", str(page), "--split", "test"]
    assert main(command) == 0
    assert "run: no photos, because dataset 'elsewhere' is not prepared" in capsys.readouterr().err
    text = page.read_text()
    assert text.count('<div class="photo none">') == 12
    assert "Missing on this page" in text
    assert list(sections(text)) == ["curves", "scores", "captions", "truth", "words", "sweeps", "settings"]
    # Captions that do not have the stored scores are not shown.
    edited(tmp_path / "run" / "captions_test.json", lambda found: found[0].update(caption="a red circle"))
    assert main(command) == 0
    assert "the captions and the scores of split test differ" in capsys.readouterr().err
    assert "captions" not in sections(page.read_text())
    # Without captions, only what training wrote.
    (tmp_path / "run" / "captions_test.json").unlink()
    assert main(command) == 0
    assert "it has no captions_test.json" in capsys.readouterr().err
    assert list(sections(page.read_text())) == ["curves", "scores", "sweeps", "settings"]


def test_markup_in_names_and_captions_stays_text(
    reported: Path, tmp_path: Path, edited: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "<img src=x onerror=alert(1)>'\"&"
    shutil.copytree(reported / "first", tmp_path / evil, ignore=shutil.ignore_patterns("checkpoints"))
    edited(tmp_path / evil / "experiment.json", lambda found: found["data"].update(dataset="elsewhere"))
    for name in ("captions", "references"):
        path = tmp_path / evil / f"{name}_test.json"
        path.write_text(path.read_text().replace("a ", evil.replace('"', "") + " "))
    (tmp_path / evil / "scores_test.json").write_text(
        (reported / "first" / "scores_test.json").read_text().replace('"signature": "', '"signature": "</script>')
    )
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / evil), "--output", str(page), "--split", "test"]) == 0
    text = page.read_text()
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert text.count("</script>") == 1


def test_runs_without_epochs_get_them_from_their_other_lines(reported: Path, tmp_path: Path) -> None:
    shutil.copytree(reported / "first", tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [(line["epoch"], line["loss"]) for line in lines if line["kind"] == "train"]
    for line in lines[::2]:
        del line["epoch"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run.load(tmp_path / "run")
    found = groups(read_records([(run, tmp_path)]))
    assert axis_of(found, "train", "loss") == "epoch"
    (line,) = curves(found, "train", "loss")
    assert [*line.points] == [pytest.approx(point, abs=1e-3) for point in expected]
    for one in lines:
        one.pop("epoch", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = groups(read_records([(run, tmp_path)]))
    assert axis_of(found, "train", "loss") == "step"
    assert [x for x, _ in curves(found, "train", "loss")[0].points] == [
        line["step"] for line in lines if line["kind"] == "train"
    ]


def test_mistakes_are_one_line(reported: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    run = str(reported / "first")
    assert "is not a run, and has no runs in it" in refused(["report", str(tmp_path)])
    assert "has no split 'nowhere'" in refused(["report", run, "--split", "nowhere"])
    assert "is a folder: give the name of a file" in refused(["report", run, "--output", str(tmp_path)])
    assert "--images is 0" in refused(["report", run, "--images", "0"])
    (tmp_path / "file").write_text("")
    assert "can't be written" in refused(["report", run, "--output", str(tmp_path / "file" / "page.html")])


def test_wording_of_captions_by_hand() -> None:
    captions = dict.fromkeys(range(5), "a red dog runs") | {5: "the cat"}
    references = {image: ["a brown dog", "the dog jumps up"] for image in range(5)} | {
        5: ["the cat", "a cat sits here"]
    }
    found = wording(captions, references, DEFAULT)
    assert found.lengths == {2: 1 / 6, 4: 5 / 6}
    assert found.reference_lengths == {2: 1 / 12, 3: 5 / 12, 4: 6 / 12}
    assert found.mean_length == pytest.approx(22 / 6)
    assert (found.different, found.captions) == (2, 6)
    assert (found.words, found.reference_words) == (6, 9)
    over = {use.word: (use.captions, use.references) for use in found.overused}
    under = {use.word: (use.captions, use.references) for use in found.underused}
    # "cat", "sits" and "here" are in too few images.
    assert over == {"red": (5 / 6, 0), "runs": (5 / 6, 0), "a": (5 / 6, pytest.approx(3 / 6))}
    assert under == {
        "the": (1 / 6, pytest.approx(3 / 6)),
        "brown": (0, pytest.approx(2.5 / 6)),
        "jumps": (0, pytest.approx(2.5 / 6)),
        "up": (0, pytest.approx(2.5 / 6)),
    }


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 50])
def test_every_image_is_chosen_once(count: int) -> None:
    ranking = {image: float((7 * image) % 10) for image in range(10)}
    chosen = choose(ranking, count)
    assert len(set(chosen.all)) == len(chosen.all) == min(count, 10)
    assert len(chosen.best) == len(chosen.worst) == min(count, 10) // 3
    ordered = sorted(ranking, key=lambda image: -ranking[image])
    assert list(chosen.best) == ordered[: len(chosen.best)]
    assert list(chosen.worst) == ordered[::-1][: len(chosen.worst)]


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (3.1, 3.11), (0.0, 0.0), (-5.0, 987.0), (41.0, 41.0), (1e-6, 2e-6)]
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert ticks == sorted(set(ticks))
