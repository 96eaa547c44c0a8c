"""The part of the page about objects: those that captions name wrongly, and those that they leave out."""

import math
from collections.abc import Mapping, Sequence

from imgcap_jax.metrics.objects import ObjectCounts, ObjectScores, object_scores
from imgcap_jax.report.html import Cell, number, section, table, text
from imgcap_jax.report.run_page.records import Record
from imgcap_jax.report.run_page.splits import SplitResult
from imgcap_jax.tokenizers import splits_english_words

_MOST = 12  # objects per list
_ENOUGH = 10  # the section is shown if references name objects in at least this many images


def found_objects(record: Record, result: SplitResult) -> ObjectScores | None:
    """The objects of the captions; None if the captions are not English or describe hardly any of COCO's objects."""
    if result.truth is not None or not splits_english_words(record.run.vocabulary.tokenizer):
        return None
    scores = object_scores(result.captions, result.references)
    return scores if sum(map(bool, scores.present.values())) >= _ENOUGH else None


def mistakes(found: Mapping[str, ObjectScores]) -> str:
    """The section of mistakes. found: name of the run -> the objects of its captions; the first one in detail."""
    name, first = next(iter(found.items()))
    rows = [
        [Cell(run), *(number(_percent(value)) for value in (one.chair_s, one.chair_i, one.recall, one.precision))]
        for run, one in found.items()
    ]
    said = (
        "<p>COCO's 80 objects and their synonyms, as CHAIR counts them (Rohrbach et al. 2018); orange is the fruit, "
        "even if a caption means the colour. An object is present if a reference caption names it. CHAIRs: captions "
        "that name an absent object. CHAIRi: mentions of absent objects. Published scores also use COCO's annotations "
        "of objects; they cannot be compared with these.</p>"
    )
    head = ["captions of", "CHAIRs (%)", "CHAIRi (%)", "recall (%)", "precision (%)"]
    counts = {name: one for name, one in first.per_object.items() if one.present or one.named}
    wrong = {name: (one.named - one.correct, one.precision) for name, one in counts.items()}
    missed = {name: (one.present - one.correct, one.recall) for name, one in counts.items()}
    parts = [
        said,
        table(head, rows, "objects in captions; lower is better for CHAIR, higher for the others"),
        '<div class="charts">',
        _most_frequent("Named, but in no reference", ["object", "captions", "precision (%)"], wrong),
        _most_frequent("In a reference, but not named", ["object", "images", "recall (%)"], missed),
        "</div>",
        f"<details><summary>All {len(counts)} objects</summary>{_all(counts, name)}</details>",
    ]
    return section("mistakes", "Most frequent mistakes", "".join(parts))


def _most_frequent(title: str, head: Sequence[str], mistakes: Mapping[str, tuple[int, float]]) -> str:
    """A table of the most frequent mistakes; "" if there are none. mistakes: object -> how often, and the share."""
    found = sorted((one for one in mistakes.items() if one[1][0] > 0), key=lambda one: -one[1][0])[:_MOST]
    rows = [[Cell(name), number(float(count), 0), number(_percent(share))] for name, (count, share) in found]
    return f'<div class="chart"><h3>{text(title)}</h3>{table(head, rows, "most frequent first")}</div>' if rows else ""


def _all(counts: Mapping[str, ObjectCounts], run: str) -> str:
    rows = [
        [
            Cell(name),
            number(float(one.present), 0),
            number(float(one.named), 0),
            number(float(one.correct), 0),
            number(_percent(one.recall)),
            number(_percent(one.precision)),
        ]
        for name, one in counts.items()
    ]
    head = ["object", "in a reference", "named", "both", "recall (%)", "precision (%)"]
    return table(head, rows, f"images per object, captions of {run}")


def _percent(value: float) -> float | None:
    return None if math.isnan(value) else 100 * value
