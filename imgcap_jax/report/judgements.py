"""Lines for the terminal that report the correlation of metrics with human ratings."""

import math
from collections.abc import Mapping

from imgcap_jax.errors import counted
from imgcap_jax.metrics.judgement_files import JudgementReport
from imgcap_jax.metrics.judgements import Correlation, Estimate
from imgcap_jax.report.columns import aligned


def lines(report: JudgementReport) -> list[str]:
    """What was rated, one table of correlations x100 for each kind of observation, and the warnings."""
    ratings = [rating for pair in report.pairs for rating in pair.ratings]
    images = len({pair.image for pair in report.pairs})
    several = len(ratings) > len(report.pairs)
    excluded = f"{counted(report.excluded, 'pair')} left out, whose caption is a reference of the image"
    shared = next(iter(report.scores.signatures.values())).rsplit("|", 1)[0]
    found = [
        f"{counted(len(report.pairs), 'pair')} of an image and a caption, {counted(len(ratings), 'rating')} from "
        f"{min(ratings):g} to {max(ratings):g}, {counted(images, 'image')}; {excluded}",
        "",
        *_table("each rating" if several else "rating", report.each, report.scores.signatures),
    ]
    if several:
        found += ["", *_table("mean rating", report.mean, report.scores.signatures)]
    found += [
        f"signature of each metric: {shared}|(last column)",
        f"intervals: bootstrap over images, {report.bootstrap} samples, seed 0",
    ]
    found += [f"{name} is missing: {how}" for name, how in report.scores.missing.items()]
    return [*found, *(f"warning: {warning}" for warning in report.warnings)]


def _table(title: str, correlations: Mapping[str, Correlation], signatures: Mapping[str, str]) -> list[str]:
    table = [[f"{title}, tau x100", "tau-b", "95 % interval", "tau-c", "95 % interval", ""]]
    for name, found in correlations.items():
        table.append([name, *_cells(found.tau_b), *_cells(found.tau_c), signatures[name].rsplit("|", 1)[1]])
    return aligned(table, left=(0, 5))


def _cells(estimate: Estimate) -> list[str]:
    interval = "-" if math.isnan(estimate.low) else f"{100 * estimate.low:+.1f} to {100 * estimate.high:+.1f}"
    return ["-" if math.isnan(estimate.value) else f"{100 * estimate.value:+.1f}", interval]
