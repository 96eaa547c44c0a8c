"""Trains and evaluates the runs of a study. What is finished is skipped, and what was interrupted resumes."""

import json
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import jax

from imgcap_jax.ablation.records import (
    Record,
    Result,
    current_results,
    decoding_text,
    evaluated_source,
    failure_file,
    reason_of,
)
from imgcap_jax.ablation.runs import StudyRun, populations, runs_of, split_group, variants_of
from imgcap_jax.ablation.scores import reported_scores
from imgcap_jax.data.scenes.language import is_true, parse_caption
from imgcap_jax.data.scenes.world import Scene
from imgcap_jax.data.sources import CaptionSource, parse_mixture
from imgcap_jax.errors import UserError, counted
from imgcap_jax.experiment import digest
from imgcap_jax.files import OwnedError, owning, read_json, reading, write_text
from imgcap_jax.population import train_population
from imgcap_jax.remote import shown
from imgcap_jax.run.evaluation import Evaluation, sweep
from imgcap_jax.run.finder import is_run
from imgcap_jax.run.folder import Run
from imgcap_jax.study import Study
from imgcap_jax.terminal import Say
from imgcap_jax.train import train
from imgcap_jax.training.metrics_file import read_metrics

_TRAINED = "trained.json"  # in the folder of a run whose training has ended
_CLAIMS = ".claims"


@dataclass
class Ablation:
    """What is done of a study.

    Attributes:
        finished: the names of the runs with all results.
        failed: the name of each run that failed -> why.
        elsewhere: the names of the runs of other shards, and of those that other processes train.
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
    processes: int = 1,
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
        processes: the number of processes that share the runs on this machine.
        shard: (i, n): every n-th run, from the i-th on, which counts from 1.
        show: receives the lines for the user.

    Raises:
        UserError: the folder contains another study, its files are damaged, the dataset or a score does not exist, or
            the start is missing.
    """
    check_study(study, folder, init_from)
    done, source, runs = Ablation(), evaluated_source(study), runs_of(study)
    number, shards = shard
    own = runs[number - 1 :: shards]
    done.elsewhere += [run.name for place, run in enumerate(runs) if place % shards != number - 1]
    for group in populations(own, max(1, min(together, -(-len(own) // processes)))):
        _Group(study, source, folder, cache, init_from, done, show).run(group)
        if done.interrupted:
            break
        jax.clear_caches()  # compiled programs would use up the process's memory mappings
    return done


def check_study(study: Study, folder: Path, init_from: Path | None) -> None:
    """Checks a study before anything is trained.

    Raises:
        UserError: a score does not exist, the start of the runs is missing, or the folder has runs of other settings or
            with another start.
    """
    reported_scores(study)
    if is_run(folder):
        raise UserError(f"{folder} is a run; the runs of a study are in a folder: choose another --run")
    if study.from_run and init_from is None:
        raise UserError("the runs of this study start from another run; name it with --init-from")
    for run in runs_of(study):
        path = folder / run.name
        if not is_run(path):
            continue
        before = Run.load(path)
        before.check_same(run.experiment, init_from)
        if init_from is None and before.init_from is not None:
            raise UserError(
                f"{path} started from {shown(before.init_from)}; give --init-from {shown(before.init_from)}"
            )


def missing_results(run: StudyRun, folder: Path, source: CaptionSource) -> list[str]:
    """The names of the settings of a run that have no current results."""
    _, results = current_results(folder, run, source)
    return [setting.name for setting in run.settings if setting.name not in results]


@dataclass
class _Group:
    """Trains and evaluates groups of runs. The attributes are the arguments of ``ablate``."""

    study: Study
    source: CaptionSource
    folder: Path
    cache: Path
    init_from: Path | None
    done: Ablation
    show: Say

    def run(self, group: Sequence[StudyRun]) -> None:
        """Does what is missing of a group, unless another process does it."""
        with ExitStack() as claims:
            own = []
            for run in group:
                try:
                    claims.enter_context(owning(self.folder / _CLAIMS / run.name, "training"))
                except OwnedError:
                    self.done.elsewhere.append(run.name)
                    continue
                if missing_results(run, self.folder, self.source):
                    own.append(run)
                else:
                    self.done.finished.append(run.name)
            for run in own:
                if (failure := failure_file(self.folder, run)).exists():
                    self.show(f"{run.name} failed before ({reason_of(failure)}); it is tried again")
            if new := [run for run in own if not (self.folder / run.name / _TRAINED).exists()]:
                self._train(new)
            for run in own:
                if self.done.interrupted:
                    return
                if run.name not in self.done.failed:
                    self._evaluate(run)

    def _train(self, group: Sequence[StudyRun]) -> None:
        """Trains runs as one population, or in smaller groups if that fails."""
        several = f"{counted(len(group), 'run')} as one program, from {group[0].name}"
        self.show(f"training {several if len(group) > 1 else group[0].name}")
        try:
            self.done.interrupted = self._trained(group)
        except Exception as error:
            if len(group) == 1:
                self._failed(group[0], error)
                return
            # One run that fails ends the population.
            self.show(f"  {_line(error)}")
            self.show("  these runs are trained in smaller groups")
            for part in split_group(group):
                self._train(part)
                if self.done.interrupted:
                    return

    def _trained(self, group: Sequence[StudyRun]) -> int:
        """Trains runs; returns the signal that interrupted it, or 0."""

        def say(line: str) -> None:
            self.show(f"  {line}")

        first = group[0]
        if len(group) == 1:
            path = self.folder / first.name
            outcome = train(first.experiment, path, cache=self.cache, init_from=self.init_from, show=say)
            interrupted = outcome.interrupted or 0
        else:
            variants = variants_of(group)
            outcomes = train_population(variants, self.folder, cache=self.cache, init_from=self.init_from, show=say)
            interrupted = max(outcome.interrupted or 0 for outcome in outcomes.values())
        if not interrupted:
            for run in group:
                write_text(self.folder / run.name / _TRAINED, json.dumps({"runs_together": len(group)}) + "\n")
        return interrupted

    def _evaluate(self, run: StudyRun) -> None:
        try:
            self._evaluated(run).write(self.folder, run.name)
        except Exception as error:
            self._failed(run, error)
            return
        failure_file(self.folder, run).unlink(missing_ok=True)
        self.done.finished.append(run.name)

    def _evaluated(self, run: StudyRun) -> Record:
        """Captions the split with each decoding of a run's settings."""
        path = self.folder / run.name
        trained = Run.load(path)
        own_dataset = parse_mixture(run.experiment.data.dataset)[0][0]
        evaluations = sweep(
            [trained],
            self.study.split,
            cache=self.cache,
            decodings=list(dict.fromkeys(setting.experiment.decoding for setting in run.settings)),
            dataset=None if own_dataset == self.source.name else self.source.name,
        )
        found = {evaluation.decoding: evaluation for evaluation in evaluations}
        together, (seconds, rate) = _runs_together(path), _speed(path)
        return Record(
            run.seed,
            digest(run.experiment),
            self.source.name,
            self.study.split,
            self.source.fingerprint,
            next(iter(found.values())).steps[0],
            trained.parameter_count(),
            seconds / 60 / together,
            None if rate is None else rate * together,
            together,
            {setting.name: _result(found[setting.experiment.decoding]) for setting in run.settings},
        )

    def _failed(self, run: StudyRun, error: Exception) -> None:
        line, path = _line(error), failure_file(self.folder, run)
        details = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        write_text(path, f"{line}\n{details}")
        self.show(f"  {run.name} failed: {line}" + (f" (details: {path})" if details else ""))
        self.done.failed[run.name] = line


def _result(evaluation: Evaluation) -> Result:
    captioned, true = evaluation.captioned, None
    if evaluation.truth is not None:
        scenes = {example.image_id: Scene.from_json(example.scene) for example in evaluation.source}
        true = {i: is_true(parse_caption(caption), scenes[i]) for i, caption in captioned.captions.items()}
    return Result(decoding_text(evaluation.decoding), captioned.captions, true, captioned.images_per_second)


def _runs_together(folder: Path) -> int:
    path, advice = folder / _TRAINED, "delete it; the same command trains the run to its end"
    found = read_json(path, advice)
    with reading(path, advice):
        return int(found["runs_together"])


def _speed(folder: Path) -> tuple[float, float | None]:
    """The seconds of training, and the captions per second at its end; None if it is not known."""
    records = read_metrics(folder)
    rates = [rate for record in records if (rate := record.get("captions_per_second")) is not None]
    return float(records[-1]["seconds"]) if records else 0.0, rates[-1] if rates else None


def _line(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, UserError):
        return str(error)
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text:.300}"
