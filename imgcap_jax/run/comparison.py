"""Compares two runs, or two settings that were trained with several seeds each: settings, scores, cost and captions."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import SEED, differences
from imgcap_jax.files import without_nan, write_text
from imgcap_jax.metrics.compare import Difference, paired_bootstrap
from imgcap_jax.metrics.seeds import SeedDifference, compare_seeds
from imgcap_jax.remote import shown
from imgcap_jax.run.evaluation import start_name
from imgcap_jax.run.folder import Run
from imgcap_jax.run.listing import summarise
from imgcap_jax.run.stored import SplitCaptions, SplitScorers, stored_or_evaluated

PER_IMAGE = "CIDEr-D"  # by which captions are compared
_FEW = 50  # images; with fewer the bootstrap reports differences that do not exist


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: the folder that the user named.
        captions: of each run on the split.
        parameters: the number of trained parameters.
        seconds: the mean time of training, with validations and compilations; None if it is not known.
        epochs: the mean number of epochs of the newest checkpoints; None if it is not known.
        bytes: the mean size of a run's folder on disk.
    """

    name: str
    captions: Sequence[SplitCaptions]
    parameters: int
    seconds: float | None
    epochs: float | None
    bytes: float

    @property
    def per_image(self) -> dict[int, float]:
        """CIDEr-D of each image, the mean over the runs."""
        scores = [found.scores.per_image[PER_IMAGE] for found in self.captions]
        return {image_id: float(np.mean([one[image_id] for one in scores])) for image_id in scores[0]}


@dataclass(frozen=True)
class Comparison:
    """The result of ``compare``. Differences are b - a.

    Attributes:
        a, b: the two.
        split: the name of the dataset and of the split.
        settings: the fields that differ, as "decoder.hidden_size: 512 -> 1024", and the runs that the two started from,
            as "init_from: none -> runs/flickr8k".
        scores: metric -> difference, of runs or of the means over seeds.
        changes: image id -> CIDEr-D of b - CIDEr-D of a, the largest first.
        notes: one line for each reason why the comparison can mislead.
    """

    a: Side
    b: Side
    split: str
    settings: Sequence[str]
    scores: Mapping[str, Difference | SeedDifference]
    changes: Mapping[int, float]
    notes: Sequence[str]

    def write(self, path: Path) -> None:
        """Writes everything as JSON. Scores are from 0 to 1 (CIDEr-D: 0 to 10). null: a value is not known."""
        per_image = [side.per_image for side in (self.a, self.b)]
        first = self.a.captions[0]
        images = [
            {
                "image_id": image_id,
                "file_name": first.file_names[image_id],
                "references": list(first.references[image_id]),
                "captions": {
                    name: [found.captions[image_id] for found in side.captions]
                    for name, side in (("a", self.a), ("b", self.b))
                },
                PER_IMAGE: {"a": per_image[0][image_id], "b": per_image[1][image_id], "difference": change},
            }
            for image_id, change in self.changes.items()
        ]
        document = {
            "split": self.split,
            "a": _described(self.a),
            "b": _described(self.b),
            "settings": list(self.settings),
            "differences": {name: without_nan(asdict(found)) for name, found in self.scores.items()},
            "notes": list(self.notes),
            "images": images,
        }
        write_text(path, json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def _described(side: Side) -> dict[str, Any]:
    runs = [
        {
            "folder": shown(found.run.folder),
            "step": found.step,
            "decoding": found.decoding.title,
            "scores": found.scores.values,
            "signature": found.scores.signature,
        }
        for found in side.captions
    ]
    cost = {"parameters": side.parameters, "seconds": side.seconds, "epochs": side.epochs, "bytes": side.bytes}
    return {"name": side.name, **cost, "runs": runs}


def compare(
    a: Sequence[Run],
    b: Sequence[Run],
    split: str,
    *,
    cache: Callable[[Run], Path],
    decoding: Decoding | None = None,
    names: tuple[Path, Path] | None = None,
) -> Comparison:
    """Compares runs on a split.

    Args:
        a, b: a run, or several that differ only in their seeds or in those of the runs that they started from.
        split: "val", "test", ...
        cache: returns the folder of the feature stores for a run.
        decoding: the search settings of all; None: those of each run.
        names: the folders that the user named; None: those of the first runs.

    Raises:
        UserError: runs of one side differ in more than their seeds, the two have other datasets or tokenisers, or an
            error of ``stored_or_evaluated``.
    """
    titles = [shown(folder) for folder in names or (a[0].folder, b[0].folder)]
    for name, runs in zip(titles, (a, b), strict=True):
        _check_seeds(runs, name)
    sides, scorers = [], SplitScorers(split)
    for name, runs in zip(titles, (a, b), strict=True):
        captions = [
            stored_or_evaluated(run, split, cache=cache(run), decoding=decoding, scorer=scorers(run)) for run in runs
        ]
        sides.append(_side(name, captions))
    first, second = sides
    _check_same_images(first, second)
    scores, left_out = _differences(first, second)
    before, after = first.per_image, second.per_image
    changes = {image_id: after[image_id] - before[image_id] for image_id in before}
    settings = changed_settings(a[0], b[0], seeds=max(len(a), len(b)) == 1)
    return Comparison(
        first,
        second,
        f"{first.captions[0].source.name} {split}",
        settings,
        scores,
        dict(sorted(changes.items(), key=lambda change: -change[1])),
        [*left_out, *_notes(first, second)],
    )


def changed_settings(a: Run, b: Run, *, seeds: bool) -> list[str]:
    """The settings in which two runs differ, and the runs that they started from, as lines.

    Args:
        a, b: the runs.
        seeds: whether seeds count; if not, runs that differ in their seeds only are also the same start.
    """
    lines = [line for line in differences(a.experiment, b.experiment) if seeds or not line.startswith(f"{SEED}: ")]
    if start_name(a) != start_name(b) and (seeds or not _same_except_seed(a.init_from, b.init_from)):
        lines.append(f"init_from: {start_name(a) or 'none'} -> {start_name(b) or 'none'}")
    return lines


def _same_except_seed(a: Path | None, b: Path | None) -> bool:
    """Whether both are runs that differ in their seeds only. Runs that cannot be read differ."""
    if a is None or b is None:
        return False
    try:
        return not changed_settings(Run.load(a), Run.load(b), seeds=False)
    except UserError:
        return False


def _check_seeds(runs: Sequence[Run], name: str) -> None:
    for run in runs[1:]:
        others = changed_settings(runs[0], run, seeds=False)
        if others:
            raise UserError(
                f"{name}: its runs differ in more than {SEED} ({others[0]}); give single runs, or a folder of runs "
                f"that differ in their seeds"
            )


def _side(name: str, captions: Sequence[SplitCaptions]) -> Side:
    found = [summarise(one.run.folder) for one in captions]
    seconds = [one.seconds for one in found if one.seconds is not None]
    epochs = [one.epoch for one in found if one.epoch is not None]
    return Side(
        name,
        captions,
        captions[0].run.parameter_count(),
        float(np.mean(seconds)) if len(seconds) == len(found) else None,
        float(np.mean(epochs)) if len(epochs) == len(found) else None,
        float(np.mean([one.size for one in found])),
    )


def _check_same_images(a: Side, b: Side) -> None:
    first, second = a.captions[0], b.captions[0]
    if (first.source.name, first.references) != (second.source.name, second.references):
        raise UserError(
            f"{a.name} and {b.name} have different images or references ({first.source.name} and "
            f"{second.source.name}); compare runs on the same dataset"
        )
    tokenizers = [one.run.vocabulary.tokenizer for one in (first, second)]
    if tokenizers[0] != tokenizers[1]:
        raise UserError(
            f"{a.name} and {b.name} have different tokenizers ({tokenizers[0].label}, {tokenizers[1].label}), so their "
            f"scores cannot be compared"
        )


def _differences(a: Side, b: Side) -> tuple[dict[str, Difference | SeedDifference], list[str]]:
    """The metrics that all runs have with the same signature, and a note for each other one."""
    ours, other = ([found.scores for found in side.captions] for side in (b, a))
    runs = [*other, *ours]
    found: dict[str, Difference | SeedDifference] = {}
    left_out = []
    for name in dict.fromkeys(name for scores in runs for name in scores.metrics):
        signatures = list(dict.fromkeys(scores.signatures.get(name, "") for scores in runs))
        scores = [[one.metrics[name] for one in side if name in one.metrics] for side in (ours, other)]
        if "" in signatures:
            left_out.append(f"{name} is left out, because not all runs have this metric")
        elif len(signatures) > 1:
            left_out.append(f"{name} is left out, because its signatures differ ({signatures[0]} and {signatures[1]})")
        elif len(runs) > 2:
            found[name] = compare_seeds(*scores)
        else:
            found[name] = paired_bootstrap(scores[0][0], scores[1][0])
    return found, left_out


def _notes(a: Side, b: Side) -> list[str]:
    notes = []
    titles = [side.captions[0].decoding.title for side in (a, b)]
    if titles[0] != titles[1]:
        notes.append(f"the decoding differs too ({titles[0]} and {titles[1]}); --beam sets it for both")
    if len(a.captions[0].captions) < _FEW:
        notes.append(f"with {len(a.captions[0].captions)} images neither interval nor p-value is reliable")
    counts = len(a.captions), len(b.captions)
    if max(counts) > 1 and min(counts) == 1:
        notes.append("one of the two has a single run, so there is neither interval nor p-value")
    elif max(counts) == 1:
        notes.append("the intervals hold for other images, not for other seeds; compare folders of several seeds")
    return notes
