"""Scores files of captions, from any system, against a file of references (``imgcap score``)."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError, counted
from imgcap_jax.files import check_writable, without_nan, write_text
from imgcap_jax.metrics import objects, spice
from imgcap_jax.metrics.coco_format import (
    Captions,
    check_file_names,
    first_captions,
    read_captions,
    read_references,
    write_results,
)
from imgcap_jax.metrics.compare import SAMPLES, Difference, paired_bootstrap
from imgcap_jax.metrics.diversity import Diversity, SetDiversity, diversity, set_diversity
from imgcap_jax.metrics.object_annotations import read_instances
from imgcap_jax.metrics.objects import ObjectScores, object_scores
from imgcap_jax.metrics.scoring import CaptionScorer, Metric, Scores, available_metrics, why_english_only
from imgcap_jax.tokenizers import DEFAULT, Tokenizer, splits_english_words

_FEW = 50  # images; with fewer the bootstrap reports differences that do not exist


@dataclass(frozen=True)
class ScoreReport:
    """The result of ``score_files``.

    Attributes:
        files: name of the argument ("captions", "references", ...) -> path of the file.
        scores: the scores of the captions.
        diversity: the diversity of the captions.
        other: the scores of the captions of the other system; None without a comparison.
        differences: metric -> comparison of the two systems.
        bootstrap: the number of bootstrap samples of the comparison.
        sets: the diversity of several captions per image; None if they were not given.
        objects: COCO's objects in the captions; None if they were not asked for.
        other_objects: those in the captions of the other system; None without a comparison.
        warnings: one line for each reason why the results can be misleading.
    """

    files: dict[str, str]
    scores: Scores
    diversity: Diversity
    other: Scores | None
    differences: dict[str, Difference]
    bootstrap: int
    sets: SetDiversity | None
    objects: ObjectScores | None
    other_objects: ObjectScores | None
    warnings: tuple[str, ...]

    def write(self, path: Path) -> None:
        """Writes the report as JSON, with the scores of each image. Scores are from 0 to 1 (CIDEr: 0 to 10)."""
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
            document["diversity_of_samples"] = sets | {"self_cider": without_nan(self.sets.self_cider)}
        for key, found in (("objects", self.objects), ("objects_compared_with", self.other_objects)):
            if found is not None:
                document[key] = _objects(found)
        document["per_image"] = _by_image(self.scores)
        if self.other is not None:
            document["per_image_compared_with"] = _by_image(self.other)
        write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _objects(found: ObjectScores) -> dict[str, Any]:
    """Objects as JSON: ratios from 0 to 1, null if undefined. Images without a mistake are omitted from the lists."""
    ratios = {name: without_nan(getattr(found, name)) for name in ("chair_s", "chair_i", "recall", "precision")}
    per_object = {
        name: asdict(counts) | {"recall": without_nan(counts.recall), "precision": without_nan(counts.precision)}
        for name, counts in found.per_object.items()
    }
    hallucinated = {image: names for image, names in found.hallucinated.items() if names}
    missed = {image: names for image, names in found.missed.items() if names}
    return {**ratios, "per_object": per_object, "hallucinated": hallucinated, "missed": missed}


def _by_image(scores: Scores) -> dict[int, dict[str, float]]:
    image_ids = next(iter(scores.per_image.values()))
    return {i: {name: round(found[i], 6) for name, found in scores.per_image.items()} for i in image_ids}


@dataclass(frozen=True)
class OtherSystems:
    """Systems whose captions ``imgcap score --mbr`` chooses among.

    Attributes:
        files: their captions, one or several per image.
        bleu: the weight of BLEU-4 in the agreement; that of CIDEr-D is 1.
        output: the path to which the chosen captions are written; None: they are only scored.
    """

    files: Sequence[Path]
    bleu: float = 0.0
    output: Path | None = None

    def choose(
        self,
        captions: Mapping[int, Sequence[str]],
        corpus: Mapping[int, Sequence[str]] | None,
        tokenizer: Tokenizer,
    ) -> dict[int, str]:
        """The caption of each image that agrees most with the others. See ``agreement.most_agreed``."""
        from imgcap_jax.metrics.agreement import most_agreed  # JAX, which scores do not need

        documents = None if corpus is None else list(corpus.values())
        if len(documents or captions) < 2:
            raise UserError(
                "--mbr needs the document frequencies of at least two images: score more images, or give --training"
            )
        chosen = most_agreed(captions, documents, bleu=self.bleu, tokenizer=tokenizer)
        if self.output is not None:
            write_results(self.output, chosen)
        return chosen


def score_files(
    captions: Path,
    references: Path,
    *,
    compare: Path | None = None,
    mbr: OtherSystems | None = None,
    bootstrap: int | None = None,
    idf: Path | None = None,
    training: Path | None = None,
    samples: Path | None = None,
    with_spice: bool = False,
    with_objects: bool = False,
    instances: Path | None = None,
    tokenizer: Tokenizer = DEFAULT,
    part: slice = slice(None),
    output: Path | None = None,
) -> ScoreReport:
    """Scores a file of captions in COCO's format.

    Args:
        captions: results with one caption per image.
        references: annotations. Images without a caption in `captions` are omitted.
        compare: results of another system. Both systems are scored on the images that both have.
        mbr: other systems. Of their captions and `captions`, the one that agrees most with the others is scored.
        bootstrap: the number of bootstrap samples of the comparison. None means ``compare.SAMPLES``.
        idf: annotations that CIDEr's document frequencies are computed from. None uses `references`.
        training: annotations of the training split. A caption that occurs in them is not novel.
        samples: results with several captions per image, whose diversity is measured.
        with_spice: computes SPICE as well, unless the tokeniser is one for other languages than English.
        with_objects: scores COCO's objects as well (``metrics/objects.py``), unless the tokeniser is one for other
            languages than English.
        instances: COCO's instance annotations, whose objects are present in addition to those of the references.
        tokenizer: splits all captions.
        part: the images that are scored, by their place in the references.
        output: the path that the report will be written to. It is checked before anything is computed.

    Raises:
        UserError: a file cannot be read, the files have no image in common, SPICE is not installed, or options
            contradict each other.
    """
    english = splits_english_words(tokenizer)
    check_options(with_spice and english, bootstrap, with_objects, instances)
    if bootstrap is not None and compare is None:
        raise UserError("--bootstrap requires --compare: add another system's captions, or remove --bootstrap")
    drawn = bootstrap or SAMPLES
    given = {"captions": captions, "references": references, "compare": compare, "idf": idf, "training": training}
    given |= {"samples": samples, "instances": instances}
    files = {name: path for name, path in given.items() if path is not None}
    if mbr is not None:
        files |= {f"mbr_{number}": path for number, path in enumerate(mbr.files)}
    if output is not None:
        check_output(output, files.values())
    if mbr is not None and mbr.output is not None:
        check_output(mbr.output, files.values())
    # All files are read before anything is computed, because the computation can take minutes.
    warnings: list[str] = []
    whole = read_references(references)
    all_references = _only(whole, list(whole)[part])
    if not all_references:
        raise UserError(
            f"--images {part.start or 0}:{part.stop or ''} names none of the {len(whole)} images of {references}"
        )
    read = {}
    for path in (captions, compare, *(mbr.files if mbr is not None else ())):
        if path is not None and path not in read:
            found = read_captions(path)
            warnings += check_file_names(path, found, references, whole)
            read[path] = _only(found, [image for image in found if image in all_references or image not in whole])
    corpus = read_references(idf) if idf is not None else None
    trained = read_references(training) if training is not None else None
    seen = [text for texts in trained.values() for text in texts] if trained is not None else None
    sets = _sets(samples, references, whole, all_references, tokenizer, warnings) if samples is not None else None
    annotated = read_instances(instances) if instances is not None else None
    images = _common(all_references, read, warnings)
    theirs = {image_id: all_references[image_id] for image_id in images}
    twice = sum(len(set(texts)) < len(texts) for texts in theirs.values())
    if 2 * twice > len(theirs):
        warnings.append(
            f"{references}: {twice} of {len(theirs)} images have a duplicate reference: check that the "
            "annotations are not in the file twice"
        )

    chosen, reasons = choose_metrics(corpus, idf, with_spice, with_objects, annotated, instances, tokenizer)
    if with_objects and english and instances is not None and annotated is not None:
        warnings += not_annotated(images, annotated, instances)
    scorer = CaptionScorer(theirs, chosen, tokenizer=tokenizer)
    if mbr is None:
        ours = _single(read[captions], images, captions, warnings)
    else:
        pool = [read[path] for path in dict.fromkeys((captions, *mbr.files))]
        candidates = {image: [text for texts in pool for text in texts[image]] for image in images}
        if all(len(texts) == 1 for texts in candidates.values()):
            raise UserError(f"--mbr names only {captions} itself; give the captions of other systems")
        ours = mbr.choose(candidates, trained or corpus, tokenizer)
    scores = scorer.score(ours)
    scores = replace(scores, missing={**scores.missing, **reasons})
    warnings += scores.warnings
    other, compared, differences = None, None, {}
    if compare is not None:
        compared = _single(read[compare], images, compare, warnings)
        other = scorer.score(compared)
        warnings += [f"{compare}: {warning}" for warning in other.warnings if warning not in scores.warnings]
        differences = {
            name: paired_bootstrap(found, other.metrics[name], samples=drawn) for name, found in scores.metrics.items()
        }
        if len(images) < _FEW:
            warnings.append(
                f"with {counted(len(images), 'image')} neither interval nor p-value is reliable: compare on at least "
                f"{_FEW} images"
            )
    named, named_other = None, None
    if with_objects and english:
        named = object_scores(ours, theirs, annotated)
        named_other = None if compared is None else object_scores(compared, theirs, annotated)
        if not any(named.mentioned.values()):
            warnings.append("no caption names one of COCO's 80 objects: CHAIRi is undefined and printed as 0")
    return ScoreReport(
        files={name: str(path) for name, path in files.items()},
        scores=scores,
        diversity=diversity(ours.values(), seen, tokenizer),
        other=other,
        differences=differences,
        bootstrap=drawn,
        sets=sets,
        objects=named,
        other_objects=named_other,
        warnings=tuple(warnings),
    )


def check_options(with_spice: bool, bootstrap: int | None, with_objects: bool, instances: Path | None) -> None:
    """Raises UserError if SPICE is asked for and not installed, or if options contradict each other."""
    if with_spice and (reason := spice.obstacle()):
        raise UserError(reason)
    if bootstrap is not None and bootstrap < 1:
        raise UserError(f"--bootstrap is {bootstrap}; it must be at least 1 (default: {SAMPLES})")
    if instances is not None and not with_objects:
        raise UserError("--instances requires --objects: add it, or remove --instances")


def check_output(output: Path, inputs: Iterable[Path]) -> None:
    """Raises UserError if a file cannot be written, or is one of the input files."""
    check_writable(output)
    if any(path.exists() and output.exists() and path.samefile(output) for path in inputs):
        raise UserError(f"{output} is one of the input files: choose another output file")


def choose_metrics(
    corpus: Mapping[int, Sequence[str]] | None,
    corpus_file: Path | None,
    with_spice: bool,
    with_objects: bool,
    annotated: Mapping[int, Collection[str]] | None,
    instances: Path | None,
    tokenizer: Tokenizer,
) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics of ``imgcap score``.

    Args:
        corpus: the captions that document frequencies are computed from; None uses the references.
        corpus_file: their file, whose name is in the signatures.
        with_spice, with_objects: whether SPICE and the scores of COCO's objects are asked for.
        annotated: the objects of instance annotations; None if they are not given.
        instances: their file.
        tokenizer: splits all captions.

    Returns:
        Label -> metric, and the metrics that are asked for and left out -> the reason.
    """
    idf_name = corpus_file.name if corpus_file is not None else ""
    chosen = available_metrics(corpus, idf_name=idf_name, original_cider=True, tokenizer=tokenizer)
    if not splits_english_words(tokenizer):
        asked = [name for name, wanted in (("SPICE", with_spice), ("CHAIR", with_objects)) if wanted]
        return chosen, {name: why_english_only(name, tokenizer) for name in asked}
    if with_spice:
        chosen[spice.LABEL] = spice.prepare
    if with_objects:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", instances.name) if instances is not None else ""
        chosen[objects.label(annotated, name)] = objects.metric(annotated)
    return chosen, {}


def not_annotated(images: Sequence[int], annotated: Mapping[int, object], path: Path) -> list[str]:
    """A warning if some images are not in a file of instance annotations. Raises UserError if none is."""
    absent = [image for image in images if image not in annotated]
    if len(absent) == len(images):
        raise UserError(
            f"{path} has none of the {counted(len(images), 'image')} (first: image {images[0]}): give the annotations "
            "of the same images, for Karpathy's val and test splits instances_val2014.json"
        )
    if not absent:
        return []
    return [
        f"{path}: {len(absent)} of {len(images)} images are not in it (first: image {absent[0]}); only their "
        "references say which objects are present"
    ]


def _sets(
    path: Path, references_path: Path, whole: Captions, part: Captions, tokenizer: Tokenizer, warnings: list[str]
) -> SetDiversity:
    """The diversity of several captions per image, of the images of ``part``, which is a part of ``whole``."""
    captions = read_captions(path)
    warnings += check_file_names(path, captions, references_path, whole)
    strange = [image_id for image_id in captions if image_id not in whole]
    if strange:
        warnings.append(
            f"{path}: {len(strange)} of {len(captions)} images have no references (first: image {strange[0]})"
        )
    captions = _only(captions, [image_id for image_id in captions if image_id in part])
    found = set_diversity(captions, part, tokenizer)
    if found is None:
        raise UserError(
            f"{path} has no image with two captions: give several captions per image, for example those of "
            "--decode.samples 5"
        )
    return found


def _only(captions: Captions, images: Sequence[int]) -> Captions:
    """The captions of these images."""
    part = Captions()
    part.update((image_id, captions[image_id]) for image_id in images)
    part.file_names = {image_id: name for image_id, name in captions.file_names.items() if image_id in part}
    return part


def _single(captions: Captions, images: Sequence[int], path: Path, warnings: list[str]) -> dict[int, str]:
    """The first caption of each of these images, with a warning if an image of the file has several."""
    single, several = first_captions(captions)
    if several:
        warnings.append(
            f"{path} captions {counted(len(several), 'image')} more than once (first: image {several[0]}); only the "
            "first caption of each is scored"
        )
    return {image_id: single[image_id] for image_id in images}


def _common(
    references: Mapping[int, Sequence[str]], systems: Mapping[Path, Mapping[int, object]], warnings: list[str]
) -> list[int]:
    """The ids of the images with references and a caption of every system, in the order of the references."""
    for path, captions in systems.items():
        strange = [image_id for image_id in captions if image_id not in references]
        if len(strange) == len(captions):
            raise UserError(
                f"none of the {counted(len(captions), 'image')} of {path} has references (first: image {strange[0]}): "
                "check that both files belong to the same split"
            )
        if strange:
            warnings.append(
                f"{path}: {len(strange)} of {len(captions)} images have no references (first: image {strange[0]}) and "
                "are omitted"
            )
        absent = sum(image_id not in captions for image_id in references)
        if absent:
            warnings.append(
                f"{path} has no caption for {absent} of {len(references)} images with references; these are omitted: "
                "scores on a part of a split cannot be compared with scores on the whole split"
            )
    images = [image_id for image_id in references if all(image_id in captions for captions in systems.values())]
    if not images:
        raise UserError("the two systems have no image with references in common: compare captions of the same split")
    return images
