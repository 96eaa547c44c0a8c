"""Scoring files of captions, from any system, against a file of references (``imgcap score``)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError
from imgcap_jax.files import check_writable, write_text
from imgcap_jax.metrics import spice
from imgcap_jax.metrics.coco_format import first_captions, read_captions, read_references
from imgcap_jax.metrics.compare import SAMPLES, Difference, paired_bootstrap
from imgcap_jax.metrics.diversity import Diversity, SetDiversity, diversity, set_diversity
from imgcap_jax.metrics.scoring import CaptionScorer, Scores, available_metrics

_FEW = 50  # images; below, the bootstrap finds differences where there are none


@dataclass(frozen=True)
class ScoreReport:
    """What ``score_files`` found.

    Attributes:
        files: what was scored, by what it was.
        scores: of the captions. other: of those they are compared with. differences: metric -> comparison, by so many
            samples of images (`bootstrap`).
        diversity: of the captions. sets: of several captions an image, where they were given.
        warnings: one line for each thing that makes the figures less than they seem.
    """

    files: dict[str, str]
    scores: Scores
    diversity: Diversity
    other: Scores | None
    differences: dict[str, Difference]
    bootstrap: int
    sets: SetDiversity | None
    warnings: tuple[str, ...]

    def write(self, path: Path) -> None:
        """Writes everything as JSON, scores from 0 to 1 (CIDEr: to 10), of each image too."""
        document: dict[str, Any] = {
            "files": self.files,
            "scale": "0 to 1, CIDEr 0 to 10; papers print them times 100",
            "scores": self.scores.values,
            "signatures": self.scores.signatures,
            "missing": self.scores.missing,
            "diversity": asdict(self.diversity),
            "warnings": self.warnings,
        }
        if self.other is not None:
            document["compared_with"] = self.other.values
            document["bootstrap"] = {"samples": self.bootstrap, "seed": 0}
            document["differences"] = {name: asdict(found) for name, found in self.differences.items()}
        if self.sets is not None:
            sets = asdict(self.sets)
            document["diversity_of_samples"] = sets | {"self_cider": _number(self.sets.self_cider)}
        document["per_image"] = _by_image(self.scores)
        if self.other is not None:
            document["per_image_compared_with"] = _by_image(self.other)
        write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value


def _by_image(scores: Scores) -> dict[int, dict[str, float]]:
    image_ids = next(iter(scores.per_image.values()))
    return {i: {name: round(found[i], 6) for name, found in scores.per_image.items()} for i in image_ids}


def score_files(
    captions: Path,
    references: Path,
    *,
    compare: Path | None = None,
    bootstrap: int | None = None,
    idf: Path | None = None,
    training: Path | None = None,
    samples: Path | None = None,
    with_spice: bool = False,
    output: Path | None = None,
) -> ScoreReport:
    """Scores a file of captions in COCO's format.

    Args:
        captions: results, one caption an image.
        references: annotations. Images without a caption in `captions` are left out.
        compare: results of another system, scored on the images that both have.
        bootstrap: samples of images drawn for the comparison; None: ``compare.SAMPLES``.
        idf: annotations whose document frequencies CIDEr uses; None: those of `references`.
        training: annotations of which captions that occur there are not novel.
        samples: several captions an image, whose diversity is measured.
        with_spice: SPICE too.
        output: where the report is to be written, which is checked before anything is computed.

    Raises:
        UserError: a file that can't be read, no image in common, SPICE without what it needs, options that don't go
            together.
    """
    if with_spice and (reason := spice.obstacle()):
        raise UserError(reason)
    if bootstrap is not None and compare is None:
        raise UserError("--bootstrap is for --compare; give another system's captions, or leave it out")
    if bootstrap is not None and bootstrap < 1:
        raise UserError(f"--bootstrap {bootstrap}: draw at least 1 sample, better {SAMPLES}")
    drawn = bootstrap or SAMPLES
    given = {"captions": captions, "references": references, "compare": compare, "idf": idf, "training": training}
    files = {name: path for name, path in {**given, "samples": samples}.items() if path is not None}
    if output is not None:
        check_writable(output)
        if any(path.exists() and output.exists() and path.samefile(output) for path in files.values()):
            raise UserError(f"{output} is one of the files to be read: give another name")
    # All files are read before anything is computed, for that may take minutes.
    warnings: list[str] = []
    all_references = read_references(references)
    systems = {path: _single(read_captions(path), path, warnings) for path in (captions, compare) if path is not None}
    corpus = read_references(idf) if idf is not None else None
    seen = [text for texts in read_references(training).values() for text in texts] if training is not None else None
    sets = _sets(samples, all_references, warnings) if samples is not None else None
    images = _common(all_references, systems, warnings)
    theirs = {image_id: all_references[image_id] for image_id in images}
    twice = sum(len(set(texts)) < len(texts) for texts in theirs.values())
    if 2 * twice > len(theirs):
        warnings.append(
            f"{references}: {twice} of {len(theirs)} images have the same reference twice; are the annotations there "
            "twice?"
        )

    chosen = available_metrics(corpus, idf_name=idf.name if idf is not None else "", original_cider=True)
    if with_spice:
        chosen[spice.LABEL] = spice.prepare
    scorer = CaptionScorer(theirs, chosen)
    ours = {image_id: systems[captions][image_id] for image_id in images}
    scores = scorer.score(ours)
    warnings += scores.warnings
    other, differences = None, {}
    if compare is not None:
        other = scorer.score({image_id: systems[compare][image_id] for image_id in images})
        warnings += [f"{compare}: {warning}" for warning in other.warnings if warning not in scores.warnings]
        differences = {
            name: paired_bootstrap(found, other.metrics[name], samples=drawn) for name, found in scores.metrics.items()
        }
        if len(images) < _FEW:
            warnings.append(f"with {len(images)} images neither interval nor p-value can be trusted: compare on {_FEW}")
    named = {name: str(path) for name, path in files.items()}
    return ScoreReport(named, scores, diversity(ours.values(), seen), other, differences, drawn, sets, tuple(warnings))


def _sets(path: Path, references: Mapping[int, Sequence[str]], warnings: list[str]) -> SetDiversity:
    captions = read_captions(path)
    strange = [image_id for image_id in captions if image_id not in references]
    if strange:
        warnings.append(
            f"{path}: {len(strange)} of {len(captions)} images have no references (image {strange[0]} first)"
        )
    found = set_diversity(captions, references)
    if found is None:
        raise UserError(f"{path} has no image with two captions: give several an image, as --decode.samples 5 draws")
    return found


def _single(captions: Mapping[int, Sequence[str]], path: Path, warnings: list[str]) -> dict[int, str]:
    """One caption an image."""
    single, several = first_captions(captions)
    if several:
        warnings.append(
            f"{path} captions {len(several)} images more than once (image {several[0]} first): the first caption of "
            "each is scored"
        )
    return single


def _common(
    references: Mapping[int, Sequence[str]], systems: Mapping[Path, Mapping[int, str]], warnings: list[str]
) -> list[int]:
    """The images that can be scored, in the references' order."""
    for path, captions in systems.items():
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
        absent = sum(image_id not in captions for image_id in references)
        if absent:
            warnings.append(
                f"{path} has no caption for {absent} of {len(references)} images with references, which are left out: "
                "scores on a part of a split can't be compared with those on all of it"
            )
    images = [image_id for image_id in references if all(image_id in captions for captions in systems.values())]
    if not images:
        raise UserError("the two systems have no image with references in common: compare captions of the same split")
    return images
