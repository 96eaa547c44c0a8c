"""The captions that a run has stored for a split, scored again; decoded only if they are missing or out of date."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgcap_jax.data.sources import CaptionSource, open_source, parse_mixture
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.files import read_json
from imgcap_jax.metrics.coco_format import first_captions, read_captions
from imgcap_jax.metrics.scoring import CaptionScorer, Scores, available_metrics, with_custom
from imgcap_jax.run.evaluation import decoding_fields, evaluate, start_name
from imgcap_jax.run.folder import Run
from imgcap_jax.training.checkpoints import CHECKPOINTS, latest_step


@dataclass(frozen=True)
class SplitCaptions:
    """One caption per image of a split, by the best parameters of a run, with their scores.

    Attributes:
        run: the run. source: the split.
        decoding: the search settings.
        step: the step of the parameters.
        captions: image id -> caption, in the order of the split.
        references: image id -> reference captions.
        file_names: image id -> file name.
        scores: the scores of the captions.
        reused: whether the captions were read from the run's folder.
    """

    run: Run
    source: CaptionSource
    decoding: Decoding
    step: int
    captions: Mapping[int, str]
    references: Mapping[int, Sequence[str]]
    file_names: Mapping[int, str]
    scores: Scores
    reused: bool


def stored_or_evaluated(
    run: Run, split: str, *, cache: Path, decoding: Decoding | None = None, scorer: CaptionScorer | None = None
) -> SplitCaptions:
    """The captions that ``imgcap evaluate`` has stored in the run's folder, or those of a new evaluation.

    Stored captions are reused if they are those of the best parameters, of the same data and of the same decoding
    settings, and if they have the scores that were stored with them. So captions of an interrupted evaluation or of
    other references are decoded again. Only metrics that were stored and can be computed here are compared: if METEOR
    was installed later, the stored captions get its score too. A run without best parameters, of which only results
    were kept, is read as it is.

    A new evaluation is stored, unless this would replace the results of the same parameters with other decoding
    settings.

    Args:
        run: the trained run.
        split: "val", "test", ...
        cache: folder of the feature stores.
        decoding: the search settings; None: the run's own.
        scorer: the references of the split and the metrics, from ``SplitScorers``; None makes one.

    Raises:
        UserError: see ``run.evaluation.sweep``.
    """
    decoding = decoding or run.experiment.decoding
    source = _open(run, split)
    found = _read(run, source)
    if found is not None and found.decoding == _as_json(decoding):
        scores = (scorer or SplitScorers(split)(run)).score(found.captions)
        if found.has(scores):
            return _of(run, source, decoding, found.step, found.captions, scores, reused=True)
    keep = found is not None and found.decoding != _as_json(decoding)
    new = evaluate(run, split, cache=cache, decoding=decoding, write=not keep)
    return _of(run, source, decoding, new.steps[0], new.captioned.captions, new.scores, reused=False)


class SplitScorers:
    """The scorers of a split for several runs. Runs with the same data, metrics and tokeniser share one."""

    def __init__(self, split: str) -> None:
        self._split = split
        self._scorers: dict[Any, CaptionScorer] = {}

    def __call__(self, run: Run) -> CaptionScorer:
        """The scorer with the references, the metrics and the tokeniser of a run."""
        data, tokenizer, custom = run.experiment.data, run.vocabulary.tokenizer, run.experiment.metrics
        key = parse_mixture(data.dataset)[0][0], data.data_dir, tokenizer, custom
        if key not in self._scorers:
            metrics = with_custom(available_metrics(tokenizer=tokenizer), custom)
            self._scorers[key] = CaptionScorer(_references(_open(run, self._split)), metrics, tokenizer=tokenizer)
        return self._scorers[key]


def is_current(
    source: CaptionSource, best: int | None, *, dataset: str, split: str, fingerprint: str | None, step: int
) -> bool:
    """Whether stored results are those of a split and of the best parameters.

    Args:
        source: the split as it is prepared on this machine.
        best: the step of the best parameters.
        dataset, split, fingerprint: the stored names and fingerprint; None: no fingerprint was stored.
        step: the stored step.
    """
    same_data = (dataset, split) == (source.name, source.split) and fingerprint in (None, source.fingerprint)
    return same_data and step == best


def _open(run: Run, split: str) -> CaptionSource:
    data = run.experiment.data
    return open_source(parse_mixture(data.dataset)[0][0], split, data.data_dir)


def _references(source: CaptionSource) -> dict[int, Sequence[str]]:
    return {int(image_id): source.captions(number) for number, image_id in enumerate(source.image_ids())}


def _of(
    run: Run,
    source: CaptionSource,
    decoding: Decoding,
    step: int,
    captions: Mapping[int, str],
    scores: Scores,
    *,
    reused: bool,
) -> SplitCaptions:
    references = _references(source)
    names = dict(zip(references, source.filenames(), strict=True))
    ordered = {image_id: captions[image_id] for image_id in references}
    return SplitCaptions(run, source, decoding, step, ordered, references, names, scores, reused)


@dataclass(frozen=True)
class _Stored:
    """What ``imgcap evaluate`` has written. decoding, values: as in the file of scores."""

    step: int
    decoding: object
    values: Mapping[str, float]
    signature: str
    captions: dict[int, str]

    def has(self, scores: Scores) -> bool:
        """Whether the scores were stored that both have. False if they have none in common."""
        way, _, labels = self.signature.rpartition("|")
        stored = {f"{way}|{label}" for label in labels.split(",")}
        common = [name for name in self.values if name in scores.values and scores.signatures[name] in stored]
        return bool(common) and all(abs(self.values[name] - scores.values[name]) < 1e-5 for name in common)


def _read(run: Run, source: CaptionSource) -> _Stored | None:
    """The stored captions of the best parameters; None: there are none, or their files cannot be read."""
    folder, split = run.folder, source.split
    scores_file, captions_file = folder / f"scores_{split}.json", folder / f"captions_{split}.json"
    if not scores_file.is_file() or not captions_file.is_file():
        return None
    try:
        found = read_json(scores_file, "evaluate the run again")
        captions = read_captions(captions_file)
        stored = _Stored(
            int(found["step"]),
            found["decoding"],
            {name: float(value) for name, value in found["scores"].items()},
            str(found["signature"]),
            first_captions(captions)[0],
        )
        best = latest_step(folder / CHECKPOINTS / "best")
        same = found.get("init_from", start_name(run)) == start_name(run) and is_current(
            source,
            stored.step if best is None else best,
            dataset=found["dataset"],
            split=found["split"],
            fingerprint=found.get("fingerprint"),
            step=stored.step,
        )
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return None
    ids = [int(image_id) for image_id in source.image_ids()]
    if not same or stored.captions.keys() != set(ids):
        return None
    return stored


def _as_json(decoding: Decoding) -> object:
    """The settings as they are read from a file."""
    return json.loads(json.dumps(decoding_fields(decoding)))
