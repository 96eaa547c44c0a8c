"""The rows of a study's table: means over seeds, and differences to the base with intervals."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imgcap_jax.ablation.records import Record, read_record
from imgcap_jax.ablation.runner import failures
from imgcap_jax.ablation.runs import runs_of
from imgcap_jax.data.sources import open_source, parse_mixture
from imgcap_jax.errors import UserError
from imgcap_jax.metrics.corpus import MetricScore, mean_score
from imgcap_jax.metrics.scoring import CaptionScorer, available_metrics, with_custom
from imgcap_jax.metrics.seeds import SeedDifference, compare_seeds, holm
from imgcap_jax.study import Setting, Study

TRUE = "true"
"""The share of captions of drawn scenes that are entirely true, as a score."""


@dataclass(frozen=True)
class ScoreRow:
    """A score of a setting.

    Attributes:
        values: of each seed. Scores are from 0 to 1, CIDEr from 0 to 10.
        mean, deviation: over seeds; NaN if there is none, or a single one.
        difference: to the base; None for the base, or if one of the two has no results.
        p_value: of the difference, corrected for the number of settings of this score (Holm, 1979); NaN if there is no
            test.
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
class StudyTable:
    """The results of a study.

    Attributes:
        study: what was computed.
        rows: one per setting, the base first.
        runs, finished: the number of runs, and of those with results.
        failed: the name of each run that failed -> why.
        dataset, images: what was captioned.
        signature: of the scores.
        missing: the name of each score that could not be computed -> how to get it.
    """

    study: Study
    rows: tuple[TableRow, ...]
    runs: int
    finished: int
    failed: dict[str, str]
    dataset: str
    images: int
    signature: str
    missing: dict[str, str]


def study_table(study: Study, folder: Path) -> StudyTable:
    """Computes the table from the results in the folder of a study.

    Raises:
        UserError: there are no results, or a score of the study does not exist.
    """
    runs = runs_of(study)
    records = {run.name: record for run in runs if (record := read_record(folder, run.name)) is not None}
    if not records:
        raise UserError(f"{folder} has no results of the study yet")
    dataset = parse_mixture(study.base.data.dataset)[0][0]
    source = open_source(dataset, study.split, study.base.data.data_dir)
    ids = [int(image_id) for image_id in source.image_ids()]
    tokenizer = study.base.data.tokenizer
    metrics = with_custom(available_metrics(tokenizer=tokenizer), study.base.metrics)
    scorer = CaptionScorer({i: source.captions(n) for n, i in enumerate(ids)}, metrics, tokenizer=tokenizer)
    found: dict[str, list[tuple[int, Record, dict[str, MetricScore]]]] = {}
    missing: dict[str, str] = {}
    for run in runs:
        for setting in run.settings:
            of_setting = found.setdefault(setting.name, [])
            record = records.get(run.name)
            result = None if record is None else record.results.get(setting.name)
            if record is None or result is None:
                continue
            scores = scorer.score(result.captions)
            missing |= scores.missing
            scored = dict(scores.metrics)
            if result.true is not None:
                scored[TRUE] = mean_score(np.array([result.true[i] for i in scorer.references.image_ids], float))
            of_setting.append((run.seed, record, scored))
    names = [name for name in study.scores if name not in missing]
    known = next(scored for of_setting in found.values() for _, _, scored in of_setting)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"the study reports the score {unknown[0]!r}, which does not exist; give some of {', '.join(known)}"
        )
    columns = {name: _column(study, name, found) for name in names}
    rows = tuple(
        _row(setting, found[setting.name], {name: columns[name][setting.name] for name in names})
        for setting in study.settings()
    )
    return StudyTable(
        study, rows, len(runs), len(records), failures(study, folder), dataset, len(ids), scorer.signature, missing
    )


def _column(
    study: Study, name: str, found: dict[str, list[tuple[int, Record, dict[str, MetricScore]]]]
) -> dict[str, ScoreRow]:
    """One score of all settings."""
    scores = {setting: [scored[name] for _, _, scored in results] for setting, results in found.items()}
    base, *others = [setting.name for setting in study.settings()]
    run_of = {setting.name: run.experiment for run in runs_of(study)[:: len(study.seeds)] for setting in run.settings}
    seeds = {setting: [seed for seed, _, _ in results] for setting, results in found.items()}
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


def _row(
    setting: Setting, results: Sequence[tuple[int, Record, dict[str, MetricScore]]], scores: dict[str, ScoreRow]
) -> TableRow:
    def mean(of: Callable[[Record], float | None]) -> float:
        return _mean([value for _, record, _ in results if (value := of(record)) is not None])

    return TableRow(
        setting,
        tuple(seed for seed, _, _ in results),
        scores,
        results[0][1].parameters if results else None,
        mean(lambda record: record.minutes),
        mean(lambda record: record.captions_per_second),
        mean(lambda record: record.results[setting.name].images_per_second),
        max((record.together for _, record, _ in results), default=1),
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
