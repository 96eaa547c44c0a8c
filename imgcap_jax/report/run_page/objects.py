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
    wrong = sorted(counts, key=lambda name: counts[name].correct - counts[name].named)
    missed = sorted(counts, key=lambda name: counts[name].correct - counts[name].present)
    parts = [
        said,
        table(head, rows, "objects in captions; lower is better for CHAIR, higher for the others"),
        '<div class="charts">',
        _named_wrongly([name for name in wrong if counts[name].named > counts[name].correct][:_MOST], counts),
        _left_out([name for name in missed if counts[name].present > counts[name].correct][:_MOST], counts),
        "</div>",
        f"<details><summary>All {len(counts)} objects</summary>{_all(counts, name)}</details>",
    ]
    return section("mistakes", "Most frequent mistakes", "".join(parts))


def _named_wrongly(names: Sequence[str], counts: Mapping[str, ObjectCounts]) -> str:
    rows = [
        [
            Cell(name),
            number(float(counts[name].named - counts[name].correct), 0),
            number(_percent(counts[name].precision)),
        ]
        for name in names
    ]
    return _card("Named, but in no reference", ["object", "captions", "precision (%)"], rows)


def _left_out(names: Sequence[str], counts: Mapping[str, ObjectCounts]) -> str:
    rows = [
        [
            Cell(name),
            number(float(counts[name].present - counts[name].correct), 0),
            number(_percent(counts[name].recall)),
        ]
        for name in names
    ]
    return _card("In a reference, but not named", ["object", "images", "recall (%)"], rows)


def _card(title: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
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
