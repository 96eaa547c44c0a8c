"""The comparison of two runs as lines of text."""

import math
from collections.abc import Sequence

from imgcap_jax.errors import counted, printable
from imgcap_jax.metrics.compare import SAMPLES
from imgcap_jax.report.columns import aligned
from imgcap_jax.run.comparison import PER_IMAGE, Comparison, Side
from imgcap_jax.terminal import duration


def lines(found: Comparison, captions: int) -> list[str]:
    """The lines of a report: what is compared, settings, scores x100, cost, and captions of each direction.

    Args:
        found: the comparison.
        captions: the number of images that are shown in each direction.
    """
    shown = [f"A: {_title(found.a)}", f"B: {_title(found.b)}", ""]
    shown += ["settings (A -> B):", *(f"  {printable(line)}" for line in found.settings or ["no difference"]), ""]
    images = counted(len(found.changes), "image")
    shown += [f"scores on {found.split}, {images}:", *(f"  {line}" for line in _scores(found)), ""]
    shown += [*(f"  {line}" for line in _cost(found)), ""]
    shown += [f"note: {note}" for note in found.notes]
    ids = list(found.changes)
    count = min(captions, len(ids) // 2)
    for title, chosen in (("B better than A", ids[:count]), ("A better than B", ids[::-1][:count])):
        shown += _captions(found, f"captions of the images where {PER_IMAGE} says {title}", chosen)
    return shown


def _title(side: Side) -> str:
    first = side.captions[0]
    seeds = f", {len(side.captions)} seeds" if len(side.captions) > 1 else ""
    read = "" if all(one.reused for one in side.captions) else ", captioned now"
    return f"{printable(side.name)} ({first.run.experiment.objective.title}{seeds}; {first.decoding.title}{read})"


def _scores(found: Comparison) -> list[str]:
    table = [["", "A", "B", "B - A", "95 % interval", "p"]]
    for name, one in found.scores.items():
        interval = p_value = "-"
        if math.isfinite(one.low):
            interval = f"{100 * one.low:+.2f} to {100 * one.high:+.2f}"
            p_value = f"{one.p_value:.3f}"
        change = f"{100 * (one.ours - one.other):+.2f}"
        table.append([name, f"{100 * one.other:.2f}", f"{100 * one.ours:.2f}", change, interval, p_value])
    several = max(len(found.a.captions), len(found.b.captions)) > 1
    how = (
        "means over seeds; t intervals for other seeds and other images" if several else "paired bootstrap over images"
    )
    return [*aligned(table, left=(0,)), f"({how}, {SAMPLES} samples, seed 0)"]


def _cost(found: Comparison) -> list[str]:
    rows = {
        "trained parameters": [f"{side.parameters:,}" for side in (found.a, found.b)],
        "epochs": ["-" if side.epochs is None else f"{side.epochs:.1f}" for side in (found.a, found.b)],
        "training time (h:mm:ss)": [
            "-" if side.seconds is None else duration(side.seconds) for side in (found.a, found.b)
        ],
        "folder (MB)": [f"{side.bytes / 1e6:.1f}" for side in (found.a, found.b)],
    }
    return aligned([["", "A", "B"], *([name, *values] for name, values in rows.items())], left=(0,))


def _captions(found: Comparison, title: str, ids: Sequence[int]) -> list[str]:
    if not ids:
        return []
    first, second = found.a.captions[0], found.b.captions[0]
    before, after = found.a.per_image, found.b.per_image
    shown = ["", f"{title}:"]
    for image_id in ids:
        shown.append(f"  {printable(first.file_names[image_id])} (image {image_id})")
        shown.append(f"    A {100 * before[image_id]:6.1f}  {printable(first.captions[image_id])}")
        shown.append(f"    B {100 * after[image_id]:6.1f}  {printable(second.captions[image_id])}")
        shown += [f"             - {printable(text)}" for text in first.references[image_id]]
    return shown
