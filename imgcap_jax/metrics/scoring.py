"""Scoring candidate captions against references.

A metric is a function that takes references and returns a function that scores candidates; to add one, add it
to `METRICS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from imgcap_jax.errors import UserError
from imgcap_jax.metrics import bleu, cider, rouge
from imgcap_jax.metrics.corpus import Candidates, MetricScores, References
from imgcap_jax.text import tokenize

Metric = Callable[[References], Callable[[Candidates], MetricScores]]

METRICS: dict[str, Metric] = {
    "BLEU:closest": bleu.prepare,
    f"ROUGE-L:b{rouge.BETA:g}": rouge.prepare,
    f"CIDEr-D:s{cider.SIGMA:g}": cider.prepare,
}
"""The metrics by name and parameters, as they stand in the signature."""


@dataclass(frozen=True)
class Scores:
    """Scores of a set of candidates.

    Attributes:
        values: metric -> score of the corpus, 0 to 1 (CIDEr-D 0 to 10); papers print them times 100.
        per_image: metric -> image id -> score.
        signature: how the scores were computed, in the manner of sacreBLEU; scores of different signatures
            can't be compared.
        warnings: one line for each thing that makes the scores less than they seem.
    """

    values: dict[str, float]
    per_image: dict[str, dict[int, float]]
    signature: str
    warnings: tuple[str, ...] = ()


class CaptionScorer:
    """Scores candidates against references that are tokenised and counted once.

    Args:
        references: image id -> raw captions; which images they are decides the idf of CIDEr-D.
        metrics: the metrics to compute, a part of `METRICS` or one's own.

    Raises:
        UserError: no image, or an image without a reference.
    """

    def __init__(self, references: Mapping[int, Sequence[str]], metrics: Mapping[str, Metric] | None = None) -> None:
        if not references:
            raise UserError("no references to score against: choose a split or file that has captions")
        bare = [image_id for image_id, captions in references.items() if not captions]
        if bare:
            raise UserError(
                f"image {bare[0]} has no reference{_and_more(bare)}: add captions, or leave it out of the references"
            )
        metrics = METRICS if metrics is None else metrics
        self._references = References.from_captions(references)
        self._metrics = [prepare(self._references) for prepare in metrics.values()]
        self.signature = self._sign(metrics)

    def score(self, candidates: Mapping[int, str]) -> Scores:
        """Scores one candidate for every image.

        Raises:
            UserError: an image has no candidate, or a candidate no references.
        """
        image_ids = self._references.image_ids
        missing = [image_id for image_id in image_ids if image_id not in candidates]
        if missing:
            raise UserError(
                f"image {missing[0]} has no candidate caption{_and_more(missing)}: "
                "caption every image that has references, or score against the references of fewer images"
            )
        if len(candidates) > len(image_ids):
            known = set(image_ids)
            strange = [image_id for image_id in candidates if image_id not in known]
            raise UserError(
                f"the candidate for image {strange[0]} has no references{_and_more(strange)}: "
                "check that captions and references belong to the same split"
            )
        tokens = [tokenize(candidates[image_id]) for image_id in image_ids]
        prepared = Candidates(tokens, self._references)
        values: dict[str, float] = {}
        per_image: dict[str, dict[int, float]] = {}
        for metric in self._metrics:
            for name, (value, of_images) in metric(prepared).items():
                values[name] = value
                per_image[name] = dict(zip(image_ids, of_images.tolist(), strict=True))
        return Scores(values, per_image, self.signature, self._warnings(tokens, candidates))

    def _sign(self, metrics: Mapping[str, Metric]) -> str:
        fewest, most = self._references.per_image.min(), self._references.per_image.max()
        return "|".join(
            [
                f"imgcap-{version('imgcap_jax')}",
                "tok:ptb-coco",
                f"refs:{fewest}" if fewest == most else f"refs:{fewest}-{most}",
                f"n:{len(self._references.image_ids)}",
                "idf:references",
                ",".join(metrics),
            ]
        )

    def _warnings(self, tokens: Sequence[list[str]], candidates: Mapping[int, str]) -> tuple[str, ...]:
        warnings = []
        if len(tokens) == 1:
            warnings.append("CIDEr-D is 0 with one image, as all its words then have an idf of 0: score more images")
        empty = sum(not words for words in tokens)
        if empty:
            warnings.append(f"{empty} of {len(tokens)} candidates have no words; they score 0")
        broken = sum("\n" in caption for caption in candidates.values())
        if broken:
            warnings.append(f"{broken} of {len(tokens)} candidates hold newlines, which were read as blanks")
        return tuple(warnings)


def _and_more(image_ids: Sequence[int]) -> str:
    return f" (and so for {len(image_ids) - 1} more)" if len(image_ids) > 1 else ""
