"""Reports of an evaluation: lines for the terminal, and an HTML page of images with captions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imgcap_jax.data.scenes.language import is_true, parse_caption
from imgcap_jax.data.scenes.world import Scene
from imgcap_jax.data.sources import CaptionExample
from imgcap_jax.report.columns import aligned
from imgcap_jax.report.contact_sheet import example_picture
from imgcap_jax.report.page import PICTURE, Row, caption_page
from imgcap_jax.run.evaluation import Evaluation


def lines(evaluation: Evaluation) -> list[str]:
    """The lines of a report: title, scores x100, caption statistics, speed, warnings and score signature."""
    report = [f"{evaluation.title}:", "  " + "  ".join(f"{k} {v}" for k, v in _scores(evaluation).items())]
    report += [f"  {sentence}" for sentence in (*_floor(evaluation), *_truth(evaluation))]
    captioned, found = evaluation.captioned, evaluation.degeneration
    report.append(
        f"  {found.length:.1f} words per caption; {100 * found.bad_endings:.1f} % with a bad ending, "
        f"{100 * found.repetitions:.1f} % with a repeated phrase, {100 * found.repeated_words:.1f} % with a repeated "
        f"word, {100 * (found.unfinished or 0):.1f} % unfinished"
    )
    report.append(
        f"  {captioned.mean_steps:.1f} decoder steps per batch on average (at most {captioned.max_steps}); "
        f"{captioned.images_per_second:.0f} images/s"
    )
    report += [f"  note: {warning}" for warning in evaluation.warnings]
    report += [f"  note: {name} is missing: {how}" for name, how in evaluation.scores.missing.items()]
    return [*report, f"  signature {evaluation.scores.signature}"]


def write_page(evaluation: Evaluation, path: Path, count: int = 10) -> None:
    """Writes a page of ``count`` images, evenly spaced over the split, with their captions."""
    source, captions = evaluation.source, evaluation.captioned.captions
    chosen = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
    rows = [_row(source[int(i)], captions) for i in chosen]
    paragraphs = [*_truth(evaluation), f"Score signature: {evaluation.scores.signature}"]
    caption_page(rows, path, evaluation.title, _scores(evaluation), paragraphs)


def _row(example: CaptionExample, captions: dict[int, str]) -> Row:
    pixels = example_picture(example, PICTURE)
    caption = captions[example.image_id]
    if not example.scene:
        return Row(pixels, caption, example.captions)
    statement = parse_caption(caption)
    true = is_true(statement, Scene.from_json(example.scene))
    note = "entirely true" if true else "not covered by the grammar" if statement is None else "not entirely true"
    return Row(pixels, caption, example.captions, note, true)


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


def table(evaluations: Sequence[Evaluation], names: Sequence[str]) -> list[str]:
    """A sweep as a table: the swept fields, the scores x100, mean decoder steps and images/s."""
    rows = []
    for evaluation in evaluations:
        swept = {name: str(_field(evaluation.decoding, name)) for name in names}
        captioned = evaluation.captioned
        rows.append(
            {
                **swept,
                **_scores(evaluation),
                "steps": f"{captioned.mean_steps:.1f}",
                "images/s": f"{captioned.images_per_second:.0f}",
            }
        )
    return aligned([list(rows[0]), *([row[name] for name in rows[0]] for row in rows)])


def _field(settings: Any, name: str) -> Any:
    """The value of a field, named as in an option: ``length-norm``, ``rules.0.words``."""
    for part in name.replace("-", "_").split("."):
        settings = settings[int(part)] if part.isdigit() else getattr(settings, part)
    return settings


def _truth(evaluation: Evaluation) -> list[str]:
    truth = evaluation.truth
    if truth is None:
        return []
    return [
        f"{100 * truth.true:.1f} % of the captions are entirely true of their scene "
        f"({100 * truth.parseable:.1f} % are covered by the grammar). "
        f"Captions state {truth.facts:.2f} facts on average, "
        f"{100 * truth.fact_ratio:.0f} % of the number in the references. Captions identify their scene among ten "
        f"similar ones with an accuracy of {100 * truth.discrimination:.1f} % (chance: 10 %)."
    ]
