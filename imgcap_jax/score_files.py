"""Scoring files of captions, from any system, against a file of references (``imgcap score``)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError
from imgcap_jax.files import write_text
from imgcap_jax.metrics import spice
from imgcap_jax.metrics.coco_format import read_captions, read_references
from imgcap_jax.metrics.compare import Difference, paired_bootstrap
from imgcap_jax.metrics.diversity import Diversity, SetDiversity, diversity, set_diversity
from imgcap_jax.metrics.scoring import CaptionScorer, Metric, Scores, metrics


@dataclass(frozen=True)
class ScoreReport:
    """What ``score_files`` found.

    Attributes:
        scores: of the captions. other: of those they are compared with. differences: metric -> comparison.
        diversity: of the captions. sets: of several captions an image, where they were given.
        warnings: one line for each thing that makes the figures less than they seem.
    """

    scores: Scores
    diversity: Diversity
    other: Scores | None
    differences: dict[str, Difference]
    sets: SetDiversity | None
    warnings: tuple[str, ...]

    def write(self, path: Path) -> None:
        """Writes everything as JSON, scores from 0 to 1 (CIDEr: to 10), of each image too."""
        names = self.scores.values
        per_image = {
            image_id: {name: round(self.scores.per_image[name][image_id], 6) for name in names}
            for image_id in next(iter(self.scores.per_image.values()))
        }
        document: dict[str, Any] = {
            "scores": self.scores.values,
            "signatures": self.scores.signatures,
            "missing": self.scores.missing,
            "diversity": asdict(self.diversity),
            "warnings": self.warnings,
        }
        if self.other is not None:
            document["compared_with"] = self.other.values
            document["differences"] = {name: asdict(found) for name, found in self.differences.items()}
        if self.sets is not None:
            document["diversity_of_samples"] = asdict(self.sets)
        write_text(path, json.dumps({**document, "per_image": per_image}, indent=1) + "\n")


def score_files(
    captions: Path,
    references: Path,
    *,
    compare: Path | None = None,
    idf: Path | None = None,
    training: Path | None = None,
    samples: Path | None = None,
    with_spice: bool = False,
    bootstrap: int = 1000,
) -> ScoreReport:
    """Scores a file of captions in COCO's format.

    Args:
        captions: results, one caption an image.
        references: annotations. Images without a caption in `captions` are left out.
        compare: results of another system, scored on the images that both have.
        idf: annotations whose document frequencies CIDEr uses; None: those of `references`.
        training: annotations of which captions that occur there are not novel.
        samples: several captions an image, whose diversity is measured.
        with_spice: SPICE too.
        bootstrap: samples of images drawn for the comparison.

    Raises:
        UserError: a file that can't be read, no image in common, SPICE without what it needs.
    """
    if with_spice and (reason := spice.obstacle()):
        raise UserError(reason)
    if bootstrap < 1:
        raise UserError(f"--bootstrap {bootstrap}: draw at least 1 sample, better 1000")
    warnings: list[str] = []
    theirs = read_references(references)
    ours = _single(read_captions(captions), captions, warnings)
    others = _single(read_captions(compare), compare, warnings) if compare is not None else None
    images = _common(theirs, [(captions, ours)] if others is None else [(captions, ours), (compare, others)], warnings)
    theirs = {image_id: theirs[image_id] for image_id in images}
    chosen: dict[str, Metric] = metrics(read_references(idf) if idf is not None else None, original_cider=True)
    if with_spice:
        chosen[spice.LABEL] = spice.prepare
    scorer = CaptionScorer(theirs, chosen, idf=idf.name if idf is not None else "references")
    ours = {image_id: ours[image_id] for image_id in images}
    scores = scorer.score(ours)
    warnings += scores.warnings
    other, differences = None, {}
    if others is not None:
        other = scorer.score({image_id: others[image_id] for image_id in images})
        warnings += [f"{compare}: {warning}" for warning in other.warnings]
        differences = {
            name: paired_bootstrap(found, other.metrics[name], samples=bootstrap)
            for name, found in scores.metrics.items()
        }
    seen = [text for texts in read_references(training).values() for text in texts] if training is not None else None
    sets = set_diversity(read_captions(samples), theirs) if samples is not None else None
    if samples is not None and sets is None:
        raise UserError(f"{samples} has no image with two captions: give several an image, as --decode.samples 5 draws")
    return ScoreReport(scores, diversity(ours.values(), seen), other, differences, sets, tuple(warnings))


def _single(captions: Mapping[int, Sequence[str]], path: Path, warnings: list[str]) -> dict[int, str]:
    """One caption an image."""
    several = [image_id for image_id, found in captions.items() if len(found) > 1]
    if several:
        warnings.append(
            f"{path} captions {len(several)} images more than once (image {several[0]} first): the first caption of "
            "each is scored"
        )
    return {image_id: found[0] for image_id, found in captions.items()}


def _common(
    references: Mapping[int, Sequence[str]],
    systems: Sequence[tuple[Path | None, Mapping[int, str]]],
    warnings: list[str],
) -> list[int]:
    """The images that can be scored, in the references' order."""
    for path, captions in systems:
        strange = [image_id for image_id in captions if image_id not in references]
        if len(strange) == len(captions):
            raise UserError(
                f"none of the {len(captions)} images of {path} has references (image {strange[0]} first): check that "
                "both files belong to the same split"
            )
        if strange:
            warnings.append(
                f"{path}: {len(strange)} of {len(captions)} images have no references (image {strange[0]} first) and "
                "are left out"
            )
    images = [image_id for image_id in references if all(image_id in captions for _, captions in systems)]
    if not images:
        raise UserError("the two systems have no image with references in common: compare captions of the same split")
    absent = len(references) - len(images)
    if absent:
        warnings.append(
            f"{absent} of {len(references)} images with references have no caption and are left out: scores on "
            f"{len(images)} images can't be compared with those on all"
        )
    return images
