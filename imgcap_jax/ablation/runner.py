"""Trains and evaluates the runs of a study. What is finished is skipped, and what was interrupted resumes."""

import json
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import jax

from imgcap_jax.ablation.records import Record, Result, decoding_text, read_record
from imgcap_jax.ablation.runs import StudyRun, populations, runs_of, split_group, variants_of
from imgcap_jax.data.scenes.language import is_true, parse_caption
from imgcap_jax.data.scenes.world import Scene
from imgcap_jax.data.sources import open_source, parse_mixture
from imgcap_jax.errors import UserError, counted
from imgcap_jax.experiment import differences
from imgcap_jax.files import owning, read_json, reading, write_text
from imgcap_jax.models.model import parameter_count, split_trained
from imgcap_jax.population import train_population
from imgcap_jax.run.evaluation import Evaluation, sweep
from imgcap_jax.run.extraction import uses_store
from imgcap_jax.run.folder import Run, is_run
from imgcap_jax.study import Study
from imgcap_jax.terminal import Say
from imgcap_jax.train import train
from imgcap_jax.training.log import METRICS

_TOGETHER = ".together"  # the number of runs that were trained in the program of a run
_FAILED = "failed"
_CLAIMS = ".claims"


@dataclass
class Ablation:
    """What is done of a study.

    Attributes:
        finished: the names of the runs with results.
        failed: the name of each run that failed -> why.
        elsewhere: the names of the runs that other processes train, or other shards.
        interrupted: the signal that ended it, or 0.
    """

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)
    interrupted: int = 0


def ablate(
    study: Study,
    folder: Path,
    *,
    cache: Path,
    init_from: Path | None = None,
    together: int = 1,
    shard: tuple[int, int] = (1, 1),
    show: Say = print,
) -> Ablation:
    """Trains and evaluates the runs of a study that have no results yet.

    Each run has its own folder in ``folder``, and can be resumed, evaluated and compared as any other run. A run that
    another process trains is left to it.

    Args:
        study: what to compute.
        folder: the folder of all runs.
        cache: folder of the features of frozen encoders.
        init_from: another run, whose best parameters are the start of all runs.
        together: the largest number of runs that are trained as one program.
        shard: (i, n): only the i-th of n parts of the runs, from 1.
        show: receives the lines for the user.

    Raises:
        UserError: the folder contains another study, its files are damaged, or the dataset or the split does not exist.
    """
    runs = runs_of(study)
    check_folder(runs, folder)
    _data_of(study)  # fails here, rather than once per run
    done = Ablation()
    number, shards = shard
    # The seeds of a setting go to different shards, unless they are trained together.
    groups = populations(runs, max(1, min(together, -(-len(runs) // shards))))
    for position, group in enumerate(groups):
        if position % shards != number - 1:
            done.elsewhere += [run.name for run in group]
            continue
        _group(study, group, folder, cache, init_from, done, show)
        if done.interrupted:
            break
        jax.clear_caches()  # compiled programs would use up the process's memory mappings
    return done


def check_folder(runs: Sequence[StudyRun], folder: Path) -> None:
    """Raises UserError if a run of the study is in the folder with other settings."""
    if is_run(folder):
        raise UserError(f"{folder} is a run; the runs of a study are in a folder: choose another --run")
    for run in runs:
        path = folder / run.name
        if not is_run(path):
            continue
        changed = differences(Run.load(path).experiment, run.experiment)
        if changed:
            raise UserError(
                f"{path} was trained with other settings ({changed[0]}); choose another --run for the changed study, "
                f"or delete the folders of the runs that changed"
            )


def needs(study: Study, run: StudyRun, folder: Path) -> list[str]:
    """The names of the settings of a run that have no results yet."""
    record = read_record(folder, run.name)
    if record is None or record.split != study.split or (record.dataset, record.fingerprint) != _data_of(study):
        return [setting.name for setting in run.settings]
    return [
        setting.name
        for setting in run.settings
        if setting.name not in record.results
        or record.results[setting.name].decoding != decoding_text(setting.experiment.decoding)
    ]


def _data_of(study: Study) -> tuple[str, str]:
    """The dataset on which all settings are evaluated, and its fingerprint."""
    name = parse_mixture(study.base.data.dataset)[0][0]
    return name, open_source(name, study.split, study.base.data.data_dir).fingerprint


def _group(
    study: Study,
    group: Sequence[StudyRun],
    folder: Path,
    cache: Path,
    init_from: Path | None,
    done: Ablation,
    show: Say,
) -> None:
    """Trains and evaluates a group of runs, as one population if there are several."""
    with ExitStack() as claims:
        own = []
        for run in group:
            if not needs(study, run, folder):
                done.finished.append(run.name)
            elif _claim(claims, folder, run):
                own.append(run)
            else:
                done.elsewhere.append(run.name)
        # Another process can have finished a run between the two looks.
        finished = [run for run in own if not needs(study, run, folder)]
        done.finished += [run.name for run in finished]
        own = [run for run in own if run not in finished]
        if own:
            _train_and_evaluate(study, own, folder, cache, init_from, done, show)


def _claim(claims: ExitStack, folder: Path, run: StudyRun) -> bool:
    try:
        claims.enter_context(owning(folder / _CLAIMS / run.name, "training"))
    except UserError:
        return False
    return True


def _train_and_evaluate(
    study: Study,
    group: Sequence[StudyRun],
    folder: Path,
    cache: Path,
    init_from: Path | None,
    done: Ablation,
    show: Say,
) -> None:
    for run in group:
        failure = _failure(folder, run)
        if failure.exists():
            show(f"{run.name} failed before ({_reason_of(failure)}); it is tried again")
    names = group[0].name if len(group) == 1 else f"{counted(len(group), 'run')} as one program, from {group[0].name}"
    show(f"training {names}")
    try:
        interrupted = _train(group, folder, cache, init_from, show)
    except Exception as error:
        if len(group) > 1:  # a member that fails alone would end the others, too
            show(f"  {_line(error)}")
            show("  these runs are trained in smaller groups")
            for part in split_group(group):
                _train_and_evaluate(study, part, folder, cache, init_from, done, show)
                if done.interrupted:
                    return
            return
        _failed(group[0], error, folder, done, show)
        return
    if interrupted:
        done.interrupted = interrupted
        return
    for run in group:
        try:
            _evaluate(study, run, folder, cache)
        except Exception as error:
            _failed(run, error, folder, done, show)
            continue
        _failure(folder, run).unlink(missing_ok=True)
        done.finished.append(run.name)


def _train(group: Sequence[StudyRun], folder: Path, cache: Path, init_from: Path | None, show: Say) -> int:
    """Trains runs; returns the signal that interrupted it, or 0."""
    for run in group:
        write_text(folder / _TOGETHER / f"{run.name}.json", json.dumps({"runs": len(group)}) + "\n")

    def say(line: str) -> None:
        show(f"  {line}")

    if len(group) == 1:
        outcome = train(group[0].experiment, folder / group[0].name, cache=cache, init_from=init_from, show=say)
        return outcome.interrupted or 0
    outcomes = train_population(variants_of(group), folder, cache=cache, init_from=init_from, show=say)
    return max(outcome.interrupted or 0 for outcome in outcomes.values())


def _evaluate(study: Study, run: StudyRun, folder: Path, cache: Path) -> None:
    """Captions the split with each decoding of a run's settings, and writes the record."""
    trained = Run.load(folder / run.name)
    dataset, fingerprint = _data_of(study)
    own_dataset = parse_mixture(run.experiment.data.dataset)[0][0]
    decodings = list(dict.fromkeys(setting.experiment.decoding for setting in run.settings))
    evaluations = sweep(
        [trained],
        study.split,
        cache=cache,
        decodings=decodings,
        dataset=None if own_dataset == dataset else dataset,
    )
    found = {evaluation.decoding: evaluation for evaluation in evaluations}
    results = {setting.name: _result(found[setting.experiment.decoding]) for setting in run.settings}
    model = trained.model(with_encoder=not uses_store(run.experiment), restored=True)
    together = _runs_together(folder / _TOGETHER / f"{run.name}.json")
    seconds, rate = _speed(folder / run.name)
    Record(
        run.seed,
        dataset,
        study.split,
        fingerprint,
        next(iter(found.values())).steps[0],
        parameter_count(split_trained(model)[1]),
        seconds / 60 / together,
        None if rate is None else rate * together,
        together,
        results,
    ).write(folder, run.name)


def _result(evaluation: Evaluation) -> Result:
    captioned, source, true = evaluation.captioned, evaluation.source, None
    if evaluation.truth is not None:
        scenes = {example.image_id: Scene.from_json(example.scene) for example in source}
        true = {i: is_true(parse_caption(caption), scenes[i]) for i, caption in captioned.captions.items()}
    return Result(decoding_text(evaluation.decoding), captioned.captions, true, captioned.images_per_second)


def _runs_together(path: Path) -> int:
    advice = 'write {"runs": 1} into it, or delete the run, which is then trained again'
    found = read_json(path, advice)
    with reading(path, advice):
        return int(found["runs"])


def _speed(folder: Path) -> tuple[float, float | None]:
    """The seconds of training, and the captions per second at its end; None if it is not known."""
    seconds, rate = 0.0, None
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        seconds = record["seconds"]
        rate = record.get("captions_per_second") or rate
    return seconds, rate


def _failure(folder: Path, run: StudyRun) -> Path:
    return folder / _FAILED / f"{run.name}.txt"


def _reason_of(failure: Path) -> str:
    lines = failure.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[0] if lines else "for an unknown reason"


def failures(study: Study, folder: Path) -> dict[str, str]:
    """The runs that failed when they were last tried, and why."""
    files = {run.name: _failure(folder, run) for run in runs_of(study)}
    return {name: _reason_of(path) for name, path in files.items() if path.exists()}


def _failed(run: StudyRun, error: Exception, folder: Path, done: Ablation, show: Say) -> None:
    line = _line(error)
    path = _failure(folder, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    details = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    write_text(path, f"{line}\n{details}")
    show(f"  {run.name} failed: {line}" + ("" if isinstance(error, UserError) else f" (details: {path})"))
    done.failed[run.name] = line


def _line(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, UserError):
        return str(error)
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text:.300}"
