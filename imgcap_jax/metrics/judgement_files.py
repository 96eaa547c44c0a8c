"""Correlates metrics with a file of human ratings (``imgcap score --judgements``)."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

from imgcap_jax.errors import UserError, counted
from imgcap_jax.files import reading, without_nan, write_text
from imgcap_jax.image_ids import parse_image_id
from imgcap_jax.metrics import objects
from imgcap_jax.metrics.coco_format import Captions, read_references
from imgcap_jax.metrics.judgements import SAMPLES, Correlation, correlate
from imgcap_jax.metrics.object_annotations import read_instances
from imgcap_jax.metrics.score_files import check_options, check_output, choose_metrics, not_annotated
from imgcap_jax.metrics.scoring import CaptionScorer, Scores
from imgcap_jax.terminal import working
from imgcap_jax.tokenizers import DEFAULT, Tokenizer, splits_english_words, tokens_of

_COLUMNS = ("image", "caption", "rating")
_EXPECTED = 'a header "image,caption,rating", then one rating per line, as in: 1000.jpg,"a dog, running",4'
_FEW = 50  # images; with fewer the intervals are too short


@dataclass(frozen=True)
class RatedPair:
    """An image, a caption and its ratings."""

    image: int
    caption: str
    ratings: tuple[float, ...]


@dataclass(frozen=True)
class JudgementReport:
    """The result of ``judge_metrics``.

    Attributes:
        files: name of the argument -> path of the file.
        pairs: the pairs of an image and a caption that are used.
        excluded: the number of pairs that are left out because their caption is a reference of the image.
        scores: the scores of the pairs. The keys of ``per_image`` are positions in `pairs`.
        each: metric -> correlation with all ratings.
        mean: metric -> correlation with the mean rating of each pair. The same as `each` if every pair has one rating.
        bootstrap: the number of bootstrap samples.
        warnings: one line for each reason why the results can be misleading.
    """

    files: dict[str, str]
    pairs: tuple[RatedPair, ...]
    excluded: int
    scores: Scores
    each: dict[str, Correlation]
    mean: dict[str, Correlation]
    bootstrap: int
    warnings: tuple[str, ...]

    def write(self, path: Path) -> None:
        """Writes the report as JSON, with scores and ratings of each pair. An undefined correlation is null."""
        document = {
            "files": self.files,
            "scale": "correlations: -1 to 1; scores: 0 to 1, CIDEr 0 to 10; papers print both times 100",
            "excluded_pairs": self.excluded,
            "each_rating": {name: without_nan(asdict(found)) for name, found in self.each.items()},
            "mean_rating": {name: without_nan(asdict(found)) for name, found in self.mean.items()},
            "bootstrap": {"samples": self.bootstrap, "seed": 0, "over": "images"},
            "signatures": self.scores.signatures,
            "missing": self.scores.missing,
            "warnings": self.warnings,
            "pairs": [
                asdict(pair) | {"scores": {name: round(found[n], 6) for name, found in self.scores.per_image.items()}}
                for n, pair in enumerate(self.pairs)
            ],
        }
        write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def judge_metrics(
    ratings: Path,
    references: Path,
    *,
    idf: Path | None = None,
    with_spice: bool = False,
    with_objects: bool = False,
    instances: Path | None = None,
    tokenizer: Tokenizer = DEFAULT,
    bootstrap: int | None = None,
    output: Path | None = None,
) -> JudgementReport:
    """Scores rated captions, and correlates the scores of each metric with the ratings.

    Args:
        ratings: a CSV file with the columns image (an id or a file name), caption and rating.
        references: annotations in COCO's format. CIDEr's document frequencies are those of all images of the file.
        idf: annotations that CIDEr's document frequencies are computed from instead.
        with_spice, with_objects, instances, tokenizer: as for ``score_files``.
        bootstrap: the number of bootstrap samples. None means ``judgements.SAMPLES``.
        output: the path that the report will be written to. It is checked before anything is computed.

    Raises:
        UserError: a file cannot be read, a rating is not valid, no pair can be used, SPICE is not installed, or options
            contradict each other.
    """
    english = splits_english_words(tokenizer)
    check_options(with_spice and english, bootstrap, with_objects, instances)
    given = {"ratings": ratings, "references": references, "idf": idf, "instances": instances}
    files = {name: path for name, path in given.items() if path is not None}
    if output is not None:
        check_output(output, files.values())
    all_references = read_references(references)
    corpus_file = references if idf is None else idf
    corpus = all_references if idf is None else read_references(idf)
    annotated = read_instances(instances) if instances is not None else None
    warnings: list[str] = []
    pairs, excluded = _usable(_read(ratings), ratings, references, all_references, tokenizer, warnings)
    if len({rating for pair in pairs for rating in pair.ratings}) == 1:
        raise UserError(
            f"{ratings}: all ratings are equal, so nothing correlates with them; give at least two different ones"
        )
    images = [pair.image for pair in pairs]
    different = list(dict.fromkeys(images))
    if len(different) < _FEW:
        warnings.append(
            f"with {counted(len(different), 'image')} the intervals are not reliable: use ratings of at least {_FEW}"
        )

    chosen, reasons = choose_metrics(corpus, corpus_file, with_spice, with_objects, annotated, instances, tokenizer)
    if with_objects and english and instances is not None and annotated is not None:
        warnings += not_annotated(different, annotated, instances)
        # The scorer takes one caption per image, so each pair counts as one image.
        label = next(label for label in chosen if label.startswith("CHAIR"))
        chosen[label] = objects.metric({n: annotated.get(image, frozenset()) for n, image in enumerate(images)})
    with working(f"scoring {counted(len(pairs), 'caption')}"):
        theirs = {n: all_references[image] for n, image in enumerate(images)}
        scorer = CaptionScorer(theirs, chosen, tokenizer=tokenizer)
        scores = scorer.score({n: pair.caption for n, pair in enumerate(pairs)})
    each, mean = {}, {}
    drawn = bootstrap or SAMPLES
    several = any(len(pair.ratings) > 1 for pair in pairs)
    rated = [pair.ratings for pair in pairs]
    with working("correlating", len(scores.metrics), "metrics") as work:
        for name, found in scores.metrics.items():
            values = found.images.tolist()
            each[name] = correlate(values, rated, images, samples=drawn)
            mean[name] = correlate(values, rated, images, mean=True, samples=drawn) if several else each[name]
            work.advance()
    return JudgementReport(
        files={name: str(path) for name, path in files.items()},
        pairs=tuple(pairs),
        excluded=excluded,
        scores=replace(scores, missing={**scores.missing, **reasons}),
        each=each,
        mean=mean,
        bootstrap=drawn,
        warnings=(*warnings, *(f"scores of the pairs: {warning}" for warning in scores.warnings)),
    )


def _read(path: Path) -> list[tuple[int, str, str, float]]:
    """The line, image, caption and rating of each row of a file of ratings."""
    with reading(path, f"give a CSV file with {_EXPECTED}"):
        text = path.read_text(encoding="utf-8-sig")
    header = text.split("\n", 1)[0]
    separator = min((one for one in ",;\t" if one in header), key=header.index, default=",")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    names = [name.strip().lower() for name in next(rows, [])]
    if missing := [name for name in _COLUMNS if name not in names]:
        raise UserError(f"{path} line 1: no column {missing[0]!r}: expected {_EXPECTED}")
    places = [names.index(name) for name in _COLUMNS]
    found = []
    line = rows.line_num + 1  # of the first line of a row; a caption in quotes can have several
    try:
        for fields in rows:
            begin, line = line, rows.line_num + 1
            where = f"{path} line {begin}"
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(names):
                raise UserError(
                    f"{where} has {counted(len(fields), 'column')}, the header has {len(names)}: put captions with "
                    f"{separator!r} in double quotes"
                )
            image, caption, rating = (fields[place].strip() for place in places)
            if not caption or not image:
                raise UserError(f"{where} has no {'image' if caption else 'caption'}: fill it in, or remove the line")
            found.append((begin, image, caption, _rating(rating, where)))
    except csv.Error as error:
        raise UserError(f"{path} line {line}: {error}: expected {_EXPECTED}") from error
    if not found:
        raise UserError(f"{path} has no ratings: expected {_EXPECTED}")
    return found


def _rating(text: str, where: str) -> float:
    try:
        rating = float(text)
    except ValueError:
        rating = math.nan
    if not math.isfinite(rating):
        raise UserError(f"{where}: the rating {text!r} is not a number: correct it, or remove the line")
    return rating


def _usable(
    rows: Sequence[tuple[int, str, str, float]],
    path: Path,
    references_path: Path,
    references: Captions,
    tokenizer: Tokenizer,
    warnings: list[str],
) -> tuple[list[RatedPair], int]:
    """The pairs of images with references, and the number of pairs that are left out as references themselves."""
    id_of = _ids(references)
    ratings: dict[tuple[int, str], list[float]] = {}
    unknown: dict[str, int] = {}
    for line, image, caption, rating in rows:
        found = id_of(image)
        if found is None:
            unknown.setdefault(image, line)
        else:
            ratings.setdefault((found, caption), []).append(rating)
    if unknown:
        first, line = next(iter(unknown.items()))
        message = (
            f"{path}: {counted(len(unknown), 'image')} without references in {references_path} (first: {first!r} in "
            f"line {line}, which is neither an id nor a file name there)"
        )
        if not ratings:
            raise UserError(f"{message}: give the references of the rated images")
        warnings.append(f"{message}; their ratings are omitted")
    known: dict[int, set[tuple[str, ...]]] = {}
    pairs = []
    for (image_id, caption), given in ratings.items():
        if image_id not in known:
            known[image_id] = {tuple(tokens_of(text, tokenizer)) for text in references[image_id]}
        if tuple(tokens_of(caption, tokenizer)) not in known[image_id]:
            pairs.append(RatedPair(image_id, caption, tuple(given)))
    if not pairs:
        raise UserError(f"{path}: all captions are references of their images: rate captions that are not references")
    return pairs, len(ratings) - len(pairs)


def _ids(references: Captions) -> Callable[[str], int | None]:
    """A function that finds the id of an image from its name in a file of ratings; None if it has no references.

    A file name counts before an id, because names such as "1000.jpg" can be read as ids too.
    """
    names = {name: image for image, name in references.file_names.items() if image in references}
    last_parts = {PurePosixPath(name).name: image for name, image in names.items()}

    def find(text: str) -> int | None:
        for known, name in ((names, text), (last_parts, PurePosixPath(text).name)):
            if name in known:
                return known[name]
        try:
            image = parse_image_id(text)
        except ValueError:
            return None
        return image if image in references else None

    return find
