"""The scores that a study can report."""

from imgcap_jax.ablation.records import evaluated_source
from imgcap_jax.errors import UserError, did_you_mean
from imgcap_jax.metrics.scoring import CaptionScorer, Metric, available_metrics, missing_metrics, with_custom
from imgcap_jax.study import Study

TRUE = "true"
"""The share of captions of drawn scenes that are entirely true, as a score."""


def metrics_of(study: Study) -> dict[str, Metric]:
    """The metrics of a study: those that can be computed on this machine, and the base's own."""
    return with_custom(available_metrics(tokenizer=study.base.data.tokenizer), study.base.metrics)


def reported_scores(study: Study) -> tuple[list[str], dict[str, str]]:
    """The scores of a study that can be computed, and how to get the others.

    Raises:
        UserError: a score does not exist, none of them can be computed, or the split does not exist.
    """
    source, tokenizer = evaluated_source(study), study.base.data.tokenizer
    few = {number: tuple(source.captions(number)) for number in range(min(2, len(source)))}
    scores = CaptionScorer(few, metrics_of(study), tokenizer=tokenizer).score({i: texts[0] for i, texts in few.items()})
    known = [*scores.values, *([TRUE] if source[0].scene else [])]
    missing = {name: how for name, how in missing_metrics(tokenizer).items() if name in study.scores}
    unknown = [name for name in study.scores if name not in known and name not in missing]
    if unknown:
        advice = did_you_mean(unknown[0], known) or f"; use some of {', '.join(known)}"
        raise UserError(f"the study reports the score {unknown[0]!r}, which does not exist{advice}")
    names = [name for name in study.scores if name in known]
    if not names:
        raise UserError(f"none of the scores of the study can be computed: {'; '.join(missing.values())}")
    return names, missing
