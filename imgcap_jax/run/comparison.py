"""Compares two runs, or two settings that were trained with several seeds each: settings, scores, cost and captions."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import differences
from imgcap_jax.files import write_text
from imgcap_jax.metrics.compare import Difference, paired_bootstrap
from imgcap_jax.metrics.scoring import CaptionScorer
from imgcap_jax.metrics.seeds import SeedDifference, compare_seeds
from imgcap_jax.models.model import parameter_count, split_trained
from imgcap_jax.remote import shown
from imgcap_jax.run.extraction import uses_store
from imgcap_jax.run.folder import Run
from imgcap_jax.run.listing import summarise
from imgcap_jax.run.stored import SplitCaptions, split_scorer, stored_or_evaluated

PER_IMAGE = "CIDEr-D"  # by which captions are compared
_SEED = "training.seed"
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
        settings: the fields that differ, as "decoder.hidden_size: 512 -> 1024".
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
            "differences": {name: _without_nan(asdict(found)) for name, found in self.scores.items()},
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


def _without_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


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
        a, b: a run, or several that differ in their seeds only.
        split: "val", "test", ...
        cache: returns the folder of the feature stores for a run.
        decoding: the search settings of all; None: those of each run.
        names: the folders that the user named; None: those of the first runs.

    Raises:
        UserError: runs of one side differ in more than their seeds, the two have other datasets or tokenisers, or an
            error of ``stored_or_evaluated``.
    """
    sides = []
    for number, runs in enumerate((a, b)):
        name = shown(names[number] if names is not None else runs[0].folder)
        _check_seeds(runs, name)
        scorers: dict[Any, CaptionScorer] = {}
        captions = []
        for run in runs:
            of = run.experiment.data.dataset, run.experiment.data.data_dir, run.experiment.metrics
            if of not in scorers:
                scorers[of] = split_scorer(run, split)
            captions.append(stored_or_evaluated(run, split, cache=cache(run), decoding=decoding, scorer=scorers[of]))
        sides.append(_side(name, captions))
    first, second = sides
    _check_same_images(first, second)
    scores = _differences(first, second)
    before, after = first.per_image, second.per_image
    changes = {image_id: after[image_id] - before[image_id] for image_id in before}
    settings = [
        line for line in differences(a[0].experiment, b[0].experiment) if max(len(a), len(b)) == 1 or not _is_seed(line)
    ]
    return Comparison(
        first,
        second,
        f"{first.captions[0].source.name} {split}",
        settings,
        scores,
        dict(sorted(changes.items(), key=lambda change: -change[1])),
        _notes(first, second),
    )


def _is_seed(line: str) -> bool:
    return line.startswith(f"{_SEED}: ")


def _check_seeds(runs: Sequence[Run], name: str) -> None:
    for run in runs[1:]:
        others = [line for line in differences(runs[0].experiment, run.experiment) if not _is_seed(line)]
        if others:
            raise UserError(
                f"{name}: its runs differ in more than {_SEED} ({others[0]}); give single runs, or a folder of runs "
                f"that differ in their seeds"
            )


def _side(name: str, captions: Sequence[SplitCaptions]) -> Side:
    run = captions[0].run
    graph_and_params = split_trained(run.model(with_encoder=not uses_store(run.experiment), restored=True))
    found = [summarise(one.run.folder) for one in captions]
    seconds = [one.seconds for one in found if one.seconds is not None]
    epochs = [one.epoch for one in found if one.epoch is not None]
    return Side(
        name,
        captions,
        parameter_count(graph_and_params[1]),
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


def _differences(a: Side, b: Side) -> dict[str, Difference | SeedDifference]:
    """The metrics that both have, with the same signature."""
    ours, other = ([found.scores for found in side.captions] for side in (b, a))
    names = [
        name
        for name in other[0].metrics
        if name in ours[0].metrics and ours[0].signatures[name] == other[0].signatures[name]
    ]
    found: dict[str, Difference | SeedDifference] = {}
    for name in names:
        scores = [[one.metrics[name] for one in side] for side in (ours, other)]
        if max(map(len, scores)) > 1:
            found[name] = compare_seeds(*scores)
        else:
            found[name] = paired_bootstrap(scores[0][0], scores[1][0])
    return found


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
