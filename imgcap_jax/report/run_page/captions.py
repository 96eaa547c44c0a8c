"""The parts of the page about captions: examples with photos, mistakes, lengths and words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imgcap_jax.data.scenes.truth import TruthScores
from imgcap_jax.errors import UserError
from imgcap_jax.metrics.objects import ObjectScores
from imgcap_jax.report.contact_sheet import example_picture
from imgcap_jax.report.examples import scene_verdict, word_attention
from imgcap_jax.report.figures import Row, WordAttention, figures
from imgcap_jax.report.html import Cell, number, pairs, section, table, text
from imgcap_jax.report.run_page.charts import bars
from imgcap_jax.report.run_page.records import Record
from imgcap_jax.report.run_page.splits import RANKING, SplitResult
from imgcap_jax.report.run_page.words import Wording, WordUse, wording
from imgcap_jax.run.members import attention_of_captions

_OTHERS = 4  # runs whose captions are shown below those of the first one
# (largest number of images, side length in pixels, quality of JPEG): a page of 1,000 photos stays below 30 MB.
_SIZES = ((48, 480, 85), (240, 336, 80), (math.inf, 256, 75))


@dataclass(frozen=True)
class Chosen:
    """The ids of the images that are shown, by the CIDEr-D of their captions."""

    best: tuple[int, ...]
    random: tuple[int, ...]
    worst: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """All of them."""
        return self.best + self.random + self.worst


def choose(ranking: Mapping[int, float], count: int) -> Chosen:
    """A third each: the highest scores, the lowest scores, and a random choice of the others."""
    ordered = sorted(ranking, key=lambda image: (-ranking[image], image))
    count = min(count, len(ordered))
    third = count // 3
    best, rest = ordered[:third], ordered[third:]
    worst, rest = (rest[len(rest) - third :][::-1], rest[: len(rest) - third])
    drawn = np.random.default_rng(0).permutation(len(rest))[: count - 2 * third]
    return Chosen(tuple(best), tuple(rest[place] for place in sorted(drawn)), tuple(worst))


def examples(
    record: Record,
    result: SplitResult,
    others: Mapping[str, SplitResult],
    count: int,
    objects: ObjectScores | None,
) -> tuple[str, list[str]]:
    """The section of images with captions, and a line for each thing that is missing.

    Args:
        record: the run whose captions are shown.
        result: its captions.
        others: the names of other runs, and their captions of the same images.
        count: the number of images.
        objects: the objects of the captions; None: they are not shown.

    Raises:
        UserError: an image cannot be decoded.
    """
    chosen = choose(result.ranking, count)
    rows, notes = _rows(record, result, others, chosen.all, objects)
    _, quality = _size(len(chosen.all))
    parts = [_introduction(result, chosen, rows)]
    for title, images in (("Best", chosen.best), ("Random", chosen.random), ("Worst", chosen.worst)):
        if images:
            shots = figures([rows[image] for image in images], quality=quality)
            parts.append(f'<section class="group"><h3>{title} <small>{len(images)}</small></h3>\n{shots}</section>\n')
    return section("captions", f"Captions of {record.name}", "".join(parts)), notes


def _introduction(result: SplitResult, chosen: Chosen, rows: Mapping[int, Row]) -> str:
    said = [
        f"{len(chosen.all):,} of {len(result.captions):,} images: those with the highest and the lowest {RANKING}, and "
        f"a random choice of the others. Bold: the generated caption. Below the line: the reference captions."
    ]
    if any(row.attention is not None for row in rows.values()):
        said.append(
            "Point at a word, tap it, or go through the words with the arrow keys: the image stays bright where the "
            "model looked when it chose the word."
        )
    if result.truth is not None:
        said.append("Green: everything that the caption states is true of the scene. Red: something is not.")
    sentences = f"<p>{text(' '.join(said))}</p>\n"
    return (
        f'{sentences}<p class="search"><label>Find images by words of their captions '
        f'<input type="search" autocomplete="off" spellcheck="false"></label> <output></output></p>\n'
    )


def _rows(
    record: Record,
    result: SplitResult,
    others: Mapping[str, SplitResult],
    images: Sequence[int],
    objects: ObjectScores | None,
) -> tuple[dict[int, Row], list[str]]:
    notes: list[str] = []
    numbers: dict[int, int] = {}
    attention: dict[int, WordAttention] = {}
    source, experiment = result.source, record.experiment
    if source is not None:
        numbers = {int(image): number for number, image in enumerate(source.image_ids())}
        wanted = {numbers[image]: result.captions[image] for image in images}
        try:
            found = attention_of_captions(record.run, source, wanted, cache=record.cache)
        except UserError as error:
            found = {}
            notes.append(f"{record.name}: no attention, because {error}")
        shown = {
            image: word_attention([experiment], found[numbers[image]].words, found[numbers[image]].attention, caption)
            for image in images
            if numbers[image] in found and (caption := result.captions[image])
        }
        attention = {image: one for image, one in shown.items() if one is not None}
    side, _ = _size(len(images))
    rows = {}
    for image in images:
        picture, verdict, true = None, "", None
        if source is not None:
            example = source[numbers[image]]
            picture = example_picture(example, side, experiment.data.resize)
            verdict, true = scene_verdict(result.captions[image], example.scene)
        if objects is not None and (wrong := objects.hallucinated[image]):
            verdict, true = f"in no reference: {', '.join(wrong)}", False
        rows[image] = Row(
            picture,
            result.captions[image],
            tuple(result.references[image]),
            verdict,
            true,
            f"{RANKING} {100 * result.ranking[image]:.1f}",
            attention.get(image),
            _of_others(others, image),
            result.file_names.get(image, str(image)),
        )
    return rows, notes


def _of_others(others: Mapping[str, SplitResult], image: int) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (name, other.captions[image], f"{100 * other.ranking[image]:.1f}")
        for name, other in list(others.items())[:_OTHERS]
        if image in other.captions and image in other.ranking
    )


def _size(count: int) -> tuple[int, int]:
    """The side length of photos in pixels, and the quality of their compression, on a page with ``count`` photos."""
    return next((side, quality) for most, side, quality in _SIZES if count <= most)


def truth(name: str, found: TruthScores) -> str:
    """The section of a run on drawn scenes: whether its captions are true."""
    values = [
        ("entirely true", f"{100 * found.true:.1f} %"),
        ("covered by the grammar", f"{100 * found.parseable:.1f} %"),
        ("facts per caption", f"{found.facts:.2f}"),
        ("facts, share of the references'", f"{100 * found.fact_ratio:.0f} %"),
        ("identify their scene among ten", f"{100 * found.discrimination:.1f} %"),
    ]
    said = (
        f"<p>Each caption of {text(name)} is compared with its scene. A caption that is true of all of ten similar "
        f"scenes identifies its own with 10 %; a false caption with 0 %.</p>"
    )
    return section("truth", "Truth of the captions", said + pairs("tiles", values))


def lengths_and_words(record: Record, results: Mapping[str, SplitResult]) -> str:
    """The section of lengths and words. results: those of the first runs of the page, that of ``record`` first."""
    tokenizer = record.run.vocabulary.tokenizer
    found = {name: wording(result.captions, result.references, tokenizer) for name, result in results.items()}
    first = found[record.name]
    size = len(record.run.vocabulary) - 4  # without special tokens
    parts = [
        _summary(found, size),
        f'<div class="charts">{_lengths(record.name, first)}{_words("Words used too often", first.overused)}'
        f"{_words('Words used too rarely', first.underused)}</div>",
    ]
    return section("words", "Lengths and words", "".join(parts))


def _summary(found: Mapping[str, Wording], size: int) -> str:
    rows = [
        [
            Cell(name),
            number(one.mean_length),
            number(float(one.words), 0),
            number(100 * one.words / size),
            number(100 * one.different / one.captions),
        ]
        for name, one in found.items()
    ]
    first = next(iter(found.values()))
    rows.append(
        [
            Cell("reference captions"),
            number(first.reference_length),
            number(float(first.reference_words), 0),
            number(None),
            number(None),
        ]
    )
    said = (
        f"<p>The vocabulary of the model has {size:,} words. Different captions: the number of different texts, as a "
        f"share of all captions.</p>"
    )
    head = ["captions of", "words per caption", "different words", "of the vocabulary (%)", "different captions (%)"]
    return said + table(head, rows, "captions in numbers")


def _lengths(name: str, found: Wording) -> str:
    both = found.lengths.keys() | found.reference_lengths.keys()
    cut = _last_common(found)
    places = list(range(min(both), cut + 1))

    def shares(of: Mapping[int, float]) -> list[float]:
        tail = sum(share for length, share in of.items() if length > cut)
        return [100 * of.get(length, 0.0) for length in places[:-1]] + [100 * (of.get(cut, 0.0) + tail)]

    names = [*map(str, places[:-1]), f"{cut}+" if max(both) > cut else str(cut)]
    return bars(
        "Lengths (% of captions)",
        names,
        [(name, shares(found.lengths)), ("references", shares(found.reference_lengths))],
        "words",
    )


def _last_common(found: Wording) -> int:
    """The length from which captions are counted together.

    At most 1 % of the references are longer, and no generated caption is.
    """
    total, last = 0.0, max(found.lengths)
    for length, share in found.reference_lengths.items():
        total += share
        if total >= 0.99:
            return max(last, length)
    return max(last, max(found.reference_lengths))


def _words(title: str, uses: Sequence[WordUse]) -> str:
    rows = [
        [
            Cell(use.word),
            number(100 * use.captions),
            number(100 * use.references),
        ]
        for use in uses
    ]
    if not rows:
        return ""
    head = ["word", "captions", "references"]
    content = table(head, rows, "% of captions with the word")
    return f'<div class="chart"><h3>{text(title)}</h3>{content}</div>'
