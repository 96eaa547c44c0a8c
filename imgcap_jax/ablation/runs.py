"""The runs of a study, and which of them can be trained in one program."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from imgcap_jax.experiment import SEED, Experiment, value_of
from imgcap_jax.population import Variant
from imgcap_jax.study import Setting, Study, changed_fields, folder_name


@dataclass(frozen=True)
class StudyRun:
    """A run of a study. Settings that differ in decoding only share it.

    Attributes:
        name: its folder in that of the study, as "hidden_size=128/seed=0".
        seed: its seed.
        experiment: what is trained. Its decoding is that of the study's base, which chooses the best parameters.
        settings: the settings that are evaluated with it, each with its own decoding.
    """

    name: str
    seed: int
    experiment: Experiment
    settings: tuple[Setting, ...]


def runs_of(study: Study) -> list[StudyRun]:
    """The runs of a study: all seeds of the first setting, then those of the next."""
    shared: list[tuple[Experiment, list[Setting]]] = []
    for setting in study.settings():
        trained = replace(setting.experiment, decoding=study.base.decoding)
        same = next((settings for experiment, settings in shared if experiment == trained), None)
        if same is None:
            shared.append((trained, [setting]))
        else:
            same.append(setting)
    return [
        StudyRun(
            f"{folder_name(settings[0].name)}/seed={seed}",
            seed,
            replace(experiment, training=replace(experiment.training, seed=seed)),
            tuple(settings),
        )
        for experiment, settings in shared
        for seed in study.seeds
    ]


def populations(runs: Sequence[StudyRun], most: int) -> list[list[StudyRun]]:
    """Groups of at most ``most`` runs that can be one population: they differ in their seed, or in numbers of the
    optimizer, of the objective, or of dropout.

    The training step can still turn out to depend on such a number (see ``population.train_population``).
    """
    groups: list[list[StudyRun]] = []
    for run in runs:
        fitting = (group for group in groups if len(group) < most and _can_differ(group[0].experiment, run.experiment))
        group = next(fitting, None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


def split_group(group: Sequence[StudyRun]) -> list[list[StudyRun]]:
    """Smaller groups, for a group that is no population: the seeds of each setting; of one setting, single runs."""
    by_setting = [list(of) for _, of in itertools.groupby(group, key=lambda run: run.settings)]
    return by_setting if len(by_setting) > 1 else [[run] for run in group]


def variants_of(group: Sequence[StudyRun]) -> list[Variant]:
    """The runs as members of a population."""
    first = group[0].experiment
    fields = list(dict.fromkeys(field for run in group[1:] for field in changed_fields(first, run.experiment)))
    return [
        Variant(run.name, run.experiment, {field: value_of(run.experiment, field) for field in fields}) for run in group
    ]


def _can_differ(one: Experiment, other: Experiment) -> bool:
    return all(
        field == SEED
        or (
            (field == "decoder.dropout" or field.split(".")[0] in ("optimizer", "objective"))
            and type(value) is float
            and type(value_of(one, field)) is float
        )
        for field, value in changed_fields(one, other).items()
    )
