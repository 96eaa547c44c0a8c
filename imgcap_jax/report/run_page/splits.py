"""The captions of a split by a run: stored, or decoded if they are missing or out of date."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgcap_jax.data.scenes.truth import TruthScores, judge
from imgcap_jax.data.scenes.world import Scene
from imgcap_jax.data.sources import CaptionSource, describe, open_source, parse_mixture
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.files import read_json
from imgcap_jax.metrics.coco_format import first_captions, read_captions, read_references
from imgcap_jax.metrics.scoring import CaptionScorer, available_metrics
from imgcap_jax.report.run_page.records import Record
from imgcap_jax.run.stored import SplitScorers, stored_or_evaluated

RANKING = "CIDEr-D"  # the metric that orders the captions


@dataclass(frozen=True)
class SplitResult:
    """The captions of a split by the best parameters of a run.

    Attributes:
        step: the step of the parameters.
        decoding: the search, in a few words.
        captions: image id -> caption.
        references: image id -> reference captions.
        file_names: image id -> file name.
        scores: metric -> score, 0 to 1 (CIDEr: 0 to 10).
        signature: how they were computed.
        ranking: image id -> CIDEr-D of its caption.
        source: the split; None: the dataset is not on this machine.
        truth: only for drawn scenes.
    """

    step: int
    decoding: str
    captions: Mapping[int, str]
    references: Mapping[int, Sequence[str]]
    file_names: Mapping[int, str]
    scores: Mapping[str, float]
    signature: str
    ranking: Mapping[int, float]
    source: CaptionSource | None = None
    truth: TruthScores | None = None


class Splits:
    """The captions of a split by several runs, whose references are processed once per dataset."""

    def __init__(self, split: str) -> None:
        self.split = split
        self._scorers = SplitScorers(split)

    def __call__(self, record: Record) -> tuple[SplitResult | None, list[str]]:
        """See ``_split_result``."""
        return _split_result(record, self.split, self._scorers)


def _split_result(record: Record, split: str, scorers: SplitScorers) -> tuple[SplitResult | None, list[str]]:
    """The captions of a split by a run, and a line for each thing that is missing on this machine.

    The split is decoded if the stored captions are missing or out of date, as by ``imgcap evaluate``. If it cannot be
    decoded here, stored captions are used as they are.

    Raises:
        UserError: the dataset has no such split.
    """
    data = record.experiment.data
    try:
        source = open_source(parse_mixture(data.dataset)[0][0], split, data.data_dir)
    except UserError as error:
        if _is_prepared(record):
            raise  # it has no such split
        return _stored(record, split, [f"{record.name}: no photos, because {error}"])
    try:
        found = stored_or_evaluated(record.run, split, cache=record.cache, scorer=scorers(record.run))
    except UserError as error:
        result, notes = _stored(record, split, [])
        return result, [f"{record.name}: split {split} was not evaluated, because {error}", *notes]
    return (
        SplitResult(
            found.step,
            found.decoding.title,
            found.captions,
            found.references,
            found.file_names,
            found.scores.values,
            found.scores.signature,
            found.scores.per_image.get(RANKING, {}),
            source,
            _truth(source, found.captions, found.references),
        ),
        [],
    )


def _is_prepared(record: Record) -> bool:
    data = record.experiment.data
    try:
        describe(parse_mixture(data.dataset)[0][0], data.data_dir)
    except UserError:
        return False
    return True


def _truth(
    source: CaptionSource, captions: Mapping[int, str], references: Mapping[int, Sequence[str]]
) -> TruthScores | None:
    if not source[0].scene:
        return None
    return judge(captions, {example.image_id: Scene.from_json(example.scene) for example in source}, references)


def _stored(record: Record, split: str, notes: list[str]) -> tuple[SplitResult | None, list[str]]:
    """The stored captions as they are, without the dataset."""
    folder = record.run.folder
    paths = [folder / f"{kind}_{split}.json" for kind in ("scores", "captions", "references")]
    lacking = [path.name for path in paths if not path.is_file()]
    if lacking:
        return None, [
            *notes,
            f"{record.name}: no captions of split {split}, because it has no {' and no '.join(lacking)}",
        ]
    advice = "evaluate the run again"
    results, captions, references = read_json(paths[0], advice), read_captions(paths[1]), read_references(paths[2])
    first, _ = first_captions(captions)
    try:
        scores = {name: float(value) for name, value in results["scores"].items()}
        step, decoding, signature = int(results["step"]), decoding_title(results["decoding"]), str(results["signature"])
        truth = TruthScores(**results["truth"]) if "truth" in results else None
    except (LookupError, TypeError, ValueError, AttributeError):
        return None, [*notes, f"{record.name}: {paths[0]} does not have the form of scores; {advice}"]
    ranking = _ranking(record, first, references)
    if ranking is None or abs(sum(ranking.values()) / len(ranking) - scores.get(RANKING, -1.0)) > 1e-5:
        return None, [*notes, f"{record.name}: the captions and the scores of split {split} differ; {advice}"]
    if record.best is not None and record.best != step:
        notes = [
            *notes,
            f"{record.name}: the captions of split {split} are of step {step:,}, not of the best parameters",
        ]
    texts = {image: tuple(found) for image, found in references.items()}
    return SplitResult(
        step, decoding, first, texts, captions.file_names, scores, signature, ranking, truth=truth
    ), notes


def decoding_title(fields: Mapping[str, Any]) -> str:
    """Stored decoding settings in a few words. Rules of users are stored by name only."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    rules = values.pop("rules", ())
    try:
        title = Decoding(**values).title
    except (TypeError, UserError):  # written by another version
        title = ", ".join(f"{name} {value}" for name, value in values.items())
    return "; ".join([title, *rules])


def _ranking(
    record: Record, captions: Mapping[int, str], references: Mapping[int, Sequence[str]]
) -> dict[int, float] | None:
    tokenizer = record.run.vocabulary.tokenizer
    known = available_metrics(tokenizer=tokenizer)
    label = next(name for name in known if name.startswith(f"{RANKING}:"))
    try:
        scores = CaptionScorer(references, {label: known[label]}, tokenizer=tokenizer).score(captions)
    except UserError:  # other images
        return None
    return scores.per_image[RANKING]


def has_scores(folder: Path, split: str) -> bool:
    """Whether the folder of a run has scores of a split."""
    return any(one["name"] == split for one in stored_scores(folder))


def stored_scores(folder: Path) -> list[dict[str, Any]]:
    """The results of all evaluations that the folder of a run contains, with the name of their split as "name"."""
    found = []
    for path in sorted(folder.glob("scores_*.json")):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if (
            isinstance(results, dict)
            and isinstance(results.get("scores"), dict)
            and isinstance(results.get("decoding"), dict)
        ):
            found.append({**results, "name": path.stem.removeprefix("scores_")})
    return found
