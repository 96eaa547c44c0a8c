"""Lines for the terminal that report the scores of caption files."""

from itertools import zip_longest

from imgcap_jax.metrics.compare import Difference
from imgcap_jax.metrics.objects import ObjectScores
from imgcap_jax.metrics.score_files import ScoreReport
from imgcap_jax.report.columns import aligned

_SHOWN = 10  # objects


def lines(report: ScoreReport) -> list[str]:
    """A table of scores x100 with signatures, followed by the diversity, comparison and warnings."""
    table = [["x100", *(["", "other", "difference", "95 % interval", "p"] if report.other else [""]), ""]]
    shared = ""
    for name, value in report.scores.values.items():
        compared = _compared(report.differences[name]) if name in report.differences else []
        shared, own_part = report.scores.signatures[name].rsplit("|", 1)
        table.append([name, f"{100 * value:.2f}", *compared, own_part])
    found = [*aligned(table, left=(0, len(table[0]) - 1)), f"signature of each metric: {shared}|(last column)"]
    found += [f"{name} is missing: {how}" for name, how in report.scores.missing.items()]
    own = report.diversity
    novel = f"; {100 * own.novel:.1f} % do not occur in the training captions" if own.novel is not None else ""
    found += [
        "",
        f"captions: {own.length:.1f} words on average, {own.vocabulary:,} different words, "
        f"distinct-1 {100 * own.distinct[0]:.1f} %, distinct-2 {100 * own.distinct[1]:.1f} %",
        f"          {100 * own.unique:.1f} % of the captions are unique: no other image has the same one{novel}",
    ]
    if report.sets is not None:
        sets = report.sets
        found.append(
            f"samples: {sets.captions:.1f} captions of each of {sets.images} images, self-CIDEr {sets.self_cider:.3f}, "
            f"Div-1 {sets.distinct[0]:.3f}, Div-2 {sets.distinct[1]:.3f}"
        )
    if report.objects is not None:
        found += ["", *_objects(report.objects)]
    if report.other is not None:
        found.append(f"compared: paired bootstrap, {report.bootstrap} samples, seed 0")
    return [*found, *(f"warning: {warning}" for warning in report.warnings)]


def _objects(scores: ObjectScores) -> list[str]:
    """The objects that are hallucinated most often, and those that are missed most often.

    "3 / 20" under "images / named in" means that 20 captions name the object, and that 3 of their images lack it.
    """
    counts = scores.per_object.items()
    absent = sorted(((c.named - c.correct, c.named, name) for name, c in counts), key=lambda row: (-row[0], row[1]))
    missed = sorted(((c.present - c.correct, c.present, name) for name, c in counts), key=lambda row: (-row[0], row[1]))
    rows = zip_longest(
        *([[name, f"{wrong} / {total}"] for wrong, total, name in one if wrong][:_SHOWN] for one in (absent, missed)),
        fillvalue=["", ""],
    )
    head = ["hallucinated most", "images / named in", "", "missed most", "images / present in"]
    return aligned([head, *([*left, "", *right] for left, right in rows)], left=(0, 3))


def _compared(difference: Difference) -> list[str]:
    low, high = 100 * difference.low, 100 * difference.high
    change = 100 * (difference.ours - difference.other)
    return [
        f"{100 * difference.other:.2f}",
        f"{change:+.2f}",
        f"{low:+.2f} to {high:+.2f}",
        f"{difference.p_value:.3f}",
    ]
