"""Studies: which settings they consist of, and which mistakes are refused."""

from dataclasses import replace
from typing import Any

import pytest

from imgcap_jax.ablation.runs import populations, runs_of, split_group, variants_of
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.models.decoders.transformer import Transformer
from imgcap_jax.study import Factor, Study, folder_name

BASE = Experiment()
ATTENTION = Factor("attention", {"none": replace(BASE, decoder=ShowTell())}, base="soft")
SIZE = Factor("size", {"64": {"decoder.hidden_size": 64}, "32": {"decoder.hidden_size": 32}}, base="large")
SMOOTHING = Factor("smoothing", {"0.1": {"objective.label_smoothing": 0.1}, "0": {"objective.label_smoothing": 0.0}})
BEAM = Factor("beam", {"5": {"decoding.beam": 5}})


def test_one_factor_at_a_time() -> None:
    study = Study(BASE, (ATTENTION, SIZE, BEAM))
    settings = study.settings()
    assert [setting.name for setting in settings] == ["base", "attention=none", "size=64", "size=32", "beam=5"]
    assert settings[0].levels == {"attention": "soft", "size": "large", "beam": str(BASE.decoding.beam)}
    assert settings[2].levels == {**settings[0].levels, "size": "64"}
    assert settings[1].experiment == replace(BASE, decoder=ShowTell())
    assert settings[2].experiment == replace(BASE, decoder=ShowAttendTell(hidden_size=64))


def test_a_grid_combines_the_changes_of_all_factors() -> None:
    smoothing = replace(BASE, objective=replace(BASE.objective, label_smoothing=0.2))  # type: ignore[type-var]
    study = Study(BASE, (ATTENTION, Factor("smoothing", {"0.2": smoothing}), BEAM), design="grid")
    settings = {setting.name: setting.experiment for setting in study.settings()}
    assert len(settings) == 8
    assert next(iter(settings)) == "base"
    whole = settings["attention=none, smoothing=0.2, beam=5"]
    assert whole == replace(smoothing, decoder=ShowTell(), decoding=replace(BASE.decoding, beam=5))


def test_a_level_that_equals_the_base_is_its_level() -> None:
    study = Study(BASE, (SMOOTHING,))
    assert BASE.objective.label_smoothing in (0.0, 0.1)  # type: ignore[attr-defined]
    own = f"{BASE.objective.label_smoothing:g}"  # type: ignore[attr-defined]
    assert [setting.levels["smoothing"] for setting in study.settings()] == [own, "0" if own == "0.1" else "0.1"]


def test_fields_of_a_part_change_together() -> None:
    """A Transformer refuses a hidden size that differs from its embedding size."""
    base = replace(BASE, decoder=Transformer(hidden_size=512, embedding_size=512))
    small = replace(base, decoder=Transformer(hidden_size=256, embedding_size=256))
    fields = {"decoder.hidden_size": 256, "decoder.embedding_size": 256}
    for level in (small, fields):
        study = Study(base, (Factor("size", {"256": level}),))
        assert study.settings()[1].experiment == small


@pytest.mark.parametrize(
    ("factors", "options", "message"),
    [
        ((), {}, "at least one factor"),
        ((BEAM, BEAM), {}, "two factors named 'beam'"),
        ((BEAM,), {"seeds": ()}, "seeds"),
        ((BEAM,), {"seeds": (1, 1)}, "seeds"),
        ((BEAM,), {"design": "all"}, "design is 'all'"),
        ((BEAM,), {"scores": ()}, "at least one score"),
        (
            (Factor("beam", {"x": {"decoding.beem": 3}}),),
            {},
            "beam=x: there is no field decoding.beem; did you mean beam?",
        ),
        (
            (Factor("beam", {"x": {"decoding.zzz": 3}}),),
            {},
            "beam=x: there is no field decoding.zzz; Decoding has beam",
        ),
        ((Factor("beam", {"x": {"decoding.beam": "one"}}),), {}, "beam=x: decoding.beam is 'one'; it must be a number"),
        ((Factor("beam", {"0": {"decoding.beam": 0}}),), {}, "beam=0: beam is 0; it must be at least 1"),
        ((Factor("beam", {"same": {"decoding.beam": BASE.decoding.beam}}),), {}, "no level that differs"),
        ((Factor("seed", {"7": {"training.seed": 7}}),), {}, "seeds of a study are its field seeds"),
        (
            (Factor("beam", {"a": {}, "b": {"decoding.beam": BASE.decoding.beam}}),),
            {},
            "beam: a and b both equal the base",
        ),
        ((Factor("beam", {"base": {"decoding.beam": 5}}, base="base"),), {}, "'base' names a level and the base"),
        ((ATTENTION, SIZE), {"design": "grid"}, "factors attention and size both change decoder"),
        ((Factor("a", {"x/y": {"decoding.beam": 5}, "x?y": {"decoding.beam": 6}}),), {}, "two folders named 'a=x_y'"),
    ],
)
def test_mistakes_are_refused(factors: tuple[Factor, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        Study(BASE, factors, **options)


def test_settings_that_differ_in_decoding_share_their_runs() -> None:
    study = Study(BASE, (ATTENTION, BEAM), seeds=(3, 5), design="grid")
    runs = runs_of(study)
    assert [run.name for run in runs] == [
        "base/seed=3",
        "base/seed=5",
        "attention=none/seed=3",
        "attention=none/seed=5",
    ]
    assert [setting.name for setting in runs[0].settings] == ["base", "beam=5"]
    assert [setting.name for setting in runs[3].settings] == ["attention=none", "attention=none, beam=5"]
    assert {run.experiment.decoding for run in runs} == {BASE.decoding}
    assert [run.experiment.training.seed for run in runs] == [3, 5, 3, 5]


def test_runs_that_differ_in_numbers_are_one_population() -> None:
    rate = Factor("rate", {"high": {"optimizer.learning_rate": 0.5}})
    runs = runs_of(Study(BASE, (rate, SIZE), seeds=(0, 1)))
    groups = populations(runs, 8)
    assert [[run.name for run in group] for group in groups] == [
        ["base/seed=0", "base/seed=1", "rate=high/seed=0", "rate=high/seed=1"],
        ["size=64/seed=0", "size=64/seed=1"],
        ["size=32/seed=0", "size=32/seed=1"],
    ]
    assert [len(group) for group in populations(runs, 3)] == [3, 1, 2, 2]
    assert [len(group) for group in populations(runs, 1)] == [1] * 8
    variants = variants_of(groups[0])
    assert {*variants[0].values} == {"training.seed", "optimizer.learning_rate"}
    assert variants[3].values == {"training.seed": 1, "optimizer.learning_rate": 0.5}
    assert [[run.name for run in part] for part in split_group(groups[0])] == [
        ["base/seed=0", "base/seed=1"],
        ["rate=high/seed=0", "rate=high/seed=1"],
    ]
    assert [len(part) for part in split_group(groups[1])] == [1, 1]


def test_folder_names_have_no_blanks_or_slashes() -> None:
    assert folder_name("hidden size=128, decoder=a/b") == "hidden_size=128,decoder=a_b"
