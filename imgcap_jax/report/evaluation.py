"""Reports of an evaluation: lines for the terminal, and an HTML page of images with captions."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from imgcap_jax.data.images import Resize
from imgcap_jax.errors import counted
from imgcap_jax.experiment import value_of
from imgcap_jax.remote import shown
from imgcap_jax.report.columns import aligned
from imgcap_jax.report.contact_sheet import example_picture
from imgcap_jax.report.examples import scene_verdict, word_attention
from imgcap_jax.report.figures import Row
from imgcap_jax.report.html import PICTURE
from imgcap_jax.report.page import caption_page
from imgcap_jax.run.evaluation import Evaluation
from imgcap_jax.run.members import Example

_PER_IMAGE = "CIDEr-D"  # the metric whose score of each image is shown
_ENOUGH_TRUE = 0.1  # share of true captions from which their discrimination is reported


def lines(evaluation: Evaluation) -> list[str]:
    """The lines of a report: title, scores x100, caption statistics, speed, warnings and score signature."""
    report = [f"{evaluation.title}:", "  " + "  ".join(f"{k} {v}" for k, v in _scores(evaluation).items())]
    report += [f"  {sentence}" for sentence in (*_floor(evaluation), *_truth(evaluation))]
    captioned = evaluation.captioned
    report.append(f"  {_defects(evaluation)}")
    report.append(
        f"  {captioned.mean_steps:.1f} decoder steps per batch on average (at most {captioned.max_steps}); "
        f"{captioned.images_per_second:.0f} images/s"
    )
    report += [f"  note: {warning}" for warning in evaluation.warnings]
    report += [f"  note: {name} is missing: {how}" for name, how in evaluation.scores.missing.items()]
    return [*report, f"  signature {evaluation.scores.signature}"]


def _defects(evaluation: Evaluation) -> str:
    found = evaluation.degeneration
    return (
        f"{found.length:.1f} words per caption; {100 * found.bad_endings:.1f} % with a bad ending, "
        f"{100 * found.repetitions:.1f} % with a repeated phrase, {100 * found.repeated_words:.1f} % with a repeated "
        f"word, {100 * (found.unfinished or 0):.1f} % unfinished"
    )


def write_page(evaluation: Evaluation, path: Path) -> None:
    """Writes a page of the examples of an evaluation, with its scores and an explanation."""
    rows = [_row(evaluation, example) for example in evaluation.examples]
    caption_page(
        rows,
        path,
        f"{_runs(evaluation)}: captions of {evaluation.source.name}, split {evaluation.source.split}",
        _scores(evaluation),
        facts=_facts(evaluation),
        legend=_legend(evaluation, rows),
        paragraphs=[*_truth(evaluation), _defects(evaluation), *(f"Note: {note}" for note in evaluation.warnings)],
    )


def _runs(evaluation: Evaluation) -> str:
    return " + ".join(str(run.folder) for run in evaluation.runs)


def _facts(evaluation: Evaluation) -> dict[str, str]:
    """What was evaluated, and how."""
    members = [
        f"{run.folder} ({run.experiment.objective.title}, best parameters of step {step:,})"
        for run, step in zip(evaluation.runs, evaluation.steps, strict=True)
    ]
    count = len(evaluation.source)
    shown = "all are shown" if len(evaluation.examples) == count else f"{len(evaluation.examples)} of them are shown"
    return {
        "Run" if len(members) == 1 else "Ensemble": " + ".join(members),
        "Dataset": f"{evaluation.source.name}, split {evaluation.source.split}",
        "Images": f"{count:,}; {shown}",
        "Decoding": evaluation.decoding.title,
        "Signature": evaluation.scores.signature,
    }


def _legend(evaluation: Evaluation, rows: Sequence[Row]) -> list[str]:
    of = f"all {counted(len(evaluation.source), 'image')} of the split, not only of those shown"
    if len(rows) == len(evaluation.source):
        of = "the images below"
    said = [
        f"The scores are times 100 and of {of}. Higher is better. Scores with different signatures cannot be compared.",
        "CIDEr-D times 100 is from 0 to 1000; the other scores times 100 are from 0 to 100.",
        "In bold: the caption that the model wrote. Below the line: the reference captions.",
    ]
    if _resize(evaluation) == "crop":
        said.append("The images are cut to the square that the model sees.")
    if _resize(evaluation) is None:
        said.append(
            "The attention is not shown, because the members of the ensemble see different parts of the images "
            "(data.resize)."
        )
    if any(row.note for row in rows):
        said.append(f"{_PER_IMAGE} below a caption is the score of this caption; the mean over all images is above.")
    if any(row.attention is not None for row in rows):
        said.append(
            "Point at a word of a caption, or tap it: the image stays bright where the model's attention was when it "
            "chose the word."
        )
    if evaluation.truth is not None:
        said.append(
            "Green: everything that the caption states is true of the scene. Red: something is not true, or the "
            "caption is not covered by the grammar that checks it."
        )
    return said


def _row(evaluation: Evaluation, found: Example) -> Row:
    example = evaluation.source[found.number]
    pixels = example_picture(example, PICTURE, _resize(evaluation) or "squash")
    caption = evaluation.captioned.captions[example.image_id]
    verdict, true = scene_verdict(caption, example.scene)
    score = evaluation.scores.per_image.get(_PER_IMAGE, {}).get(example.image_id)
    note = "" if score is None else f"{_PER_IMAGE} {100 * score:.1f}"
    experiments = [run.experiment for run in evaluation.runs]
    attention = word_attention(experiments, found.words, found.attention, caption)
    name = evaluation.source.filenames()[found.number]
    return Row(pixels, caption, example.captions, verdict, true, note, attention, name=name)


def _resize(evaluation: Evaluation) -> Resize | None:
    """How the models resize images; None if the members of an ensemble differ."""
    first, *others = {run.experiment.data.resize for run in evaluation.runs}
    return None if others else first


def _scores(evaluation: Evaluation) -> dict[str, str]:
    values = {name: f"{100 * value:.1f}" for name, value in evaluation.scores.values.items()}
    if evaluation.truth is not None:
        values["true"] = f"{100 * evaluation.truth.true:.1f} %"
    return values


def _floor(evaluation: Evaluation) -> list[str]:
    if evaluation.floor is None:
        return []
    values = "  ".join(f"{name} {100 * value:.1f}" for name, value in evaluation.floor.values.items())
    return [f"floor (each image scored with the caption of another image): {values}"]


def brief(evaluation: Evaluation) -> str:
    """One line about an evaluation of several: what was evaluated, and its most important scores x100."""
    values = _scores(evaluation)
    chosen = [f"{name} {values[name]}" for name in (_PER_IMAGE, "BLEU-4") if name in values]
    return f"{evaluation.title}: {'  '.join(chosen)}"


def table(evaluations: Sequence[Evaluation], names: Sequence[str]) -> list[str]:
    """A sweep as a table: the swept fields, the scores x100, mean decoder steps and images/s.

    The setting with the highest CIDEr-D is marked, unless several have it. With floors, their CIDEr-D is a column.
    """
    rows = [
        {name: str(value_of(evaluation.decoding, name.replace("-", "_"))) for name in names} | _columns(evaluation)
        for evaluation in evaluations
    ]
    best = [evaluation.scores.values.get(_PER_IMAGE, 0.0) for evaluation in evaluations]
    marks = ["best" if score == max(best) and best.count(score) == 1 else "" for score in best]
    return aligned([[*rows[0], ""], *([*row.values(), mark] for row, mark in zip(rows, marks, strict=True))])


def _columns(evaluation: Evaluation) -> dict[str, str]:
    captioned = evaluation.captioned
    floor = evaluation.floor
    return {
        **_scores(evaluation),
        **({} if floor is None else {"floor": f"{100 * floor.values[_PER_IMAGE]:.1f}"}),
        "steps": f"{captioned.mean_steps:.1f}",
        "images/s": f"{captioned.images_per_second:.0f}",
    }


def members_table(evaluations: Sequence[Evaluation], names: Sequence[str], *, seeds: bool) -> list[str]:
    """Evaluations of several runs as a table, one row per run.

    Args:
        evaluations: of the runs.
        names: of the runs.
        seeds: whether the runs differ only in their seeds; mean and standard deviation are then added.
    """
    rows = [_columns(evaluation) for evaluation in evaluations]
    cells = [["", *rows[0]], *([name, *row.values()] for name, row in zip(names, rows, strict=True))]
    if seeds and len(evaluations) > 1:
        values = [evaluation.scores.values for evaluation in evaluations]
        for title, of, form in (("mean", statistics.mean, ".1f"), ("std", statistics.stdev, ".2f")):
            found = {name: f"{100 * of([one[name] for one in values]):{form}}" for name in values[0]}
            cells.append([title, *(found.get(name, "") for name in rows[0])])
    return aligned(cells, left=(0,))


def remarks(evaluations: Sequence[Evaluation]) -> list[str]:
    """The notes and signatures of several evaluations, each once."""
    found = [f"note: {warning}" for one in evaluations for warning in one.warnings]
    found += [f"note: {name} is missing: {how}" for one in evaluations for name, how in one.scores.missing.items()]
    found += [f"signature {one.scores.signature}" for one in evaluations]
    return list(dict.fromkeys(found))


def written(evaluations: Sequence[Evaluation]) -> list[str]:
    """One line per folder: the files that evaluations have written."""
    names: dict[str, list[str]] = {}
    for path in dict.fromkeys(path for one in evaluations for path in one.files):
        names.setdefault(shown(path.parent), []).append(path.name)
    return [f"written into {folder}: {', '.join(files)}" for folder, files in names.items()]


def _truth(evaluation: Evaluation) -> list[str]:
    truth = evaluation.truth
    if truth is None:
        return []
    said = (
        f"{100 * truth.true:.1f} % of the captions are entirely true of their scene "
        f"({100 * truth.parseable:.1f} % are covered by the grammar). "
        f"Captions state {truth.facts:.2f} facts on average, "
        f"{100 * truth.fact_ratio:.0f} % of the number in the references."
    )
    if truth.true >= _ENOUGH_TRUE:
        said += (
            f" Captions identify their scene among ten similar ones with an accuracy of "
            f"{100 * truth.discrimination:.1f} % (a false caption counts 0; captions that fit all ten: 10 %)."
        )
    return [said]
