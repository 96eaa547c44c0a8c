"""The rows of a study's table: means over seeds, and differences to the base with intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imgcap_jax.ablation.records import Record, current_results, evaluated_source, failures
from imgcap_jax.ablation.runs import runs_of
from imgcap_jax.ablation.scores import TRUE, metrics_of, reported_scores
from imgcap_jax.experiment import Experiment
from imgcap_jax.metrics.corpus import MetricScore, mean_score
from imgcap_jax.metrics.scoring import CaptionScorer
from imgcap_jax.metrics.seeds import SeedDifference, compare_seeds, holm
from imgcap_jax.remote import shown
from imgcap_jax.run.finder import is_run
from imgcap_jax.run.folder import Run
from imgcap_jax.study import Setting, Study


@dataclass(frozen=True)
class ScoreRow:
    """A score of a setting.

    Attributes:
        values: of each seed. Scores are from 0 to 1, CIDEr from 0 to 10.
        mean, deviation: over seeds; NaN if there is none, or a single one.
        difference: to the base; None for the base, or if one of the two has no results.
        p_value: of the difference, corrected for the number of settings that the study compares with the base (Holm,
            1979), also of those without results yet; NaN if there is no test.
    """

    values: tuple[float, ...]
    mean: float
    deviation: float
    difference: SeedDifference | None
    p_value: float


@dataclass(frozen=True)
class TableRow:
    """A setting of a study.

    Attributes:
        setting: what was changed.
        seeds: those with results.
        scores: by name.
        parameters: the number of trained parameters; None without results.
        minutes: the mean time of training.
        captions_per_second: the mean speed of training; NaN if it is not known.
        images_per_second: the mean speed of decoding.
        together: the largest number of runs that were trained in one program.
    """

    setting: Setting
    seeds: tuple[int, ...]
    scores: dict[str, ScoreRow]
    parameters: int | None
    minutes: float
    captions_per_second: float
    images_per_second: float
    together: int


@dataclass(frozen=True)
class _Scored:
    """A setting with one seed: the record of its run, the speed of decoding, and the scores by name."""

    record: Record
    images_per_second: float
    scores: dict[str, MetricScore]


@dataclass(frozen=True)
class StudyTable:
    """The results of a study.

    Attributes:
        study: what was computed.
        scores: the names of the scores that could be computed.
        rows: one per setting, the base first.
        runs, finished: the number of runs, and of those with all results.
        failed: the name of each run that failed -> why.
        start: the run that all runs started from; "" if they started from random parameters.
        dataset, images: what was captioned.
        signature: of the scores.
        missing: the name of each score that could not be computed -> how to get it.
    """

    study: Study
    scores: tuple[str, ...]
    rows: tuple[TableRow, ...]
    runs: int
    finished: int
    failed: dict[str, str]
    start: str
    dataset: str
    images: int
    signature: str
    missing: dict[str, str]


def study_table(study: Study, folder: Path) -> StudyTable:
    """Computes the table from the current results in the folder of a study. Rows can have no results.

    Raises:
        UserError: a record is damaged, a score does not exist, or the split does not exist.
    """
    names, missing = reported_scores(study)
    runs, source, finished = runs_of(study), evaluated_source(study), 0
    references = {int(image_id): source.captions(number) for number, image_id in enumerate(source.image_ids())}
    scorer = CaptionScorer(references, metrics_of(study), tokenizer=study.base.data.tokenizer)
    found: dict[str, list[_Scored]] = {setting.name: [] for setting in study.settings()}
    for run in runs:
        record, results = current_results(folder, run, source)
        finished += len(results) == len(run.settings)
        for name, result in results.items():
            assert record is not None
            scores = dict(scorer.score(result.captions).metrics)
            if result.true is not None:
                scores[TRUE] = mean_score(np.array([result.true[i] for i in scorer.references.image_ids], float))
            found[name].append(_Scored(record, result.images_per_second, scores))
    run_of = {setting.name: run.experiment for run in runs[:: len(study.seeds)] for setting in run.settings}
    columns = {name: _column(name, found, run_of) for name in names}
    rows = tuple(
        _row(setting, found[setting.name], {name: columns[name][setting.name] for name in names})
        for setting in study.settings()
    )
    start = next((of.init_from for run in runs if (of := _run(folder / run.name)) is not None), None)
    return StudyTable(
        study,
        tuple(names),
        rows,
        len(runs),
        finished,
        failures(study, folder),
        "" if start is None else shown(start),
        source.name,
        len(source),
        scorer.signature,
        missing,
    )


def _run(folder: Path) -> Run | None:
    return Run.load(folder) if is_run(folder) else None


def _column(name: str, found: Mapping[str, Sequence[_Scored]], run_of: Mapping[str, Experiment]) -> dict[str, ScoreRow]:
    """One score of all settings, the base first. run_of: what is trained for each; decodings of it have the same."""
    scores = {setting: [scored.scores[name] for scored in results] for setting, results in found.items()}
    base, *others = found
    seeds = {setting: [scored.record.seed for scored in results] for setting, results in found.items()}
    differences = {
        setting: compare_seeds(
            scores[setting],
            scores[base],
            same_runs=run_of[setting] == run_of[base] and seeds[setting] == seeds[base],
        )
        if scores[setting] and scores[base]
        else None
        for setting in others
    }
    p_values = holm([math.nan if found is None else found.p_value for found in differences.values()])
    corrected = dict(zip(differences, p_values, strict=True))
    return {
        setting: _score_row([score.value for score in of], differences.get(setting), corrected.get(setting, math.nan))
        for setting, of in scores.items()
    }


def _score_row(values: Sequence[float], difference: SeedDifference | None, p_value: float) -> ScoreRow:
    return ScoreRow(
        tuple(values), _mean(values), statistics.stdev(values) if len(values) > 1 else math.nan, difference, p_value
    )


def _row(setting: Setting, results: Sequence[_Scored], scores: dict[str, ScoreRow]) -> TableRow:
    records = [scored.record for scored in results]
    return TableRow(
        setting,
        tuple(record.seed for record in records),
        scores,
        records[0].parameters if records else None,
        _mean([record.minutes for record in records]),
        _mean([rate for record in records if (rate := record.captions_per_second) is not None]),
        _mean([scored.images_per_second for scored in results]),
        max((record.together for record in records), default=1),
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
