"""The results of a study's runs, one file per run, from which the table is computed."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imgcap_jax.ablation.runs import StudyRun, runs_of
from imgcap_jax.data.sources import CaptionSource, open_source, parse_mixture
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.experiment import digest
from imgcap_jax.files import read_json, reading, write_text
from imgcap_jax.run.finder import is_run
from imgcap_jax.run.stored import is_current
from imgcap_jax.study import Setting, Study, folder_name
from imgcap_jax.training.checkpoints import CHECKPOINTS, latest_step

RESULTS, FAILED = "results", "failed"
_ADVICE = "delete it; the same command evaluates the run again"


@dataclass(frozen=True)
class Result:
    """The captions of a setting with one seed.

    Attributes:
        decoding: a text that stands for the decoding settings.
        captions: image id -> caption.
        true: image id -> whether the caption is entirely true; None unless the images are drawn scenes.
        images_per_second: of decoding, without compilation.
    """

    decoding: str
    captions: dict[int, str]
    true: dict[int, bool] | None
    images_per_second: float


@dataclass(frozen=True)
class Record:
    """The results of a run.

    Attributes:
        seed: its seed.
        experiment: the digest of what was trained.
        dataset, split: what was captioned. fingerprint: of these data.
        step: the step of its best parameters.
        parameters: the number of trained parameters.
        minutes: the time of training, with validations and compilation. That of a population is divided by its members.
        captions_per_second: the speed of training. That of a population is the sum over its members.
        together: the number of runs that were trained in the same program.
        results: the name of the setting -> its result.
    """

    seed: int
    experiment: str
    dataset: str
    split: str
    fingerprint: str
    step: int
    parameters: int
    minutes: float
    captions_per_second: float | None
    together: int
    results: dict[str, Result]

    def write(self, folder: Path, name: str) -> None:
        """Writes the record of the run ``name`` of the study in the folder."""
        write_text(_file(folder, name), json.dumps(asdict(self), indent=1) + "\n")


def evaluated_source(study: Study) -> CaptionSource:
    """The split on which all settings are evaluated. Raises UserError if it does not exist."""
    name = parse_mixture(study.base.data.dataset)[0][0]
    return open_source(name, study.split, study.base.data.data_dir)


def current_results(folder: Path, run: StudyRun, source: CaptionSource) -> tuple[Record | None, dict[str, Result]]:
    """The record of a run, and those of its results that are still those of the study; None if there are none.

    They are those of the run in its folder, of its best parameters, of the same data, and of the settings' decoding.

    Args:
        folder: the folder of the study.
        run: the run.
        source: the split, from ``evaluated_source``.

    Raises:
        UserError: the record is damaged.
    """
    record = _read(_file(folder, run.name))
    path = folder / run.name
    if (
        record is None
        or not is_run(path)
        or record.experiment != digest(run.experiment)
        or not is_current(
            source,
            latest_step(path / CHECKPOINTS / "best"),
            dataset=record.dataset,
            split=record.split,
            fingerprint=record.fingerprint,
            step=record.step,
        )
    ):
        return None, {}
    return record, {setting.name: record.results[setting.name] for setting in run.settings if _has(record, setting)}


def _has(record: Record, setting: Setting) -> bool:
    result = record.results.get(setting.name)
    return result is not None and result.decoding == decoding_text(setting.experiment.decoding)


def result_files(folder: Path) -> dict[str, int]:
    """The files of all records in the folder of a study, each with the time of its last change (ns)."""
    return {str(path): path.stat().st_mtime_ns for path in sorted((folder / RESULTS).rglob("*.json"))}


def runs_of_setting(folder: Path) -> Path | None:
    """The folder of the runs that have results of a setting of a study; None if there is no such setting.

    Args:
        folder: the folder that the setting has, or would have if it did not share the runs of another one.
    """
    for path in sorted((folder.parent / RESULTS).rglob("*.json")):
        record = _read(path)
        if record is not None and folder.name in map(folder_name, record.results):
            return folder.parent / path.relative_to(folder.parent / RESULTS).parent
    return None


def failure_file(folder: Path, run: StudyRun) -> Path:
    """The file with the reason why a run failed when it was last tried."""
    return folder / FAILED / f"{run.name}.txt"


def failures(study: Study, folder: Path) -> dict[str, str]:
    """The runs that failed when they were last tried, and why."""
    files = {run.name: failure_file(folder, run) for run in runs_of(study)}
    return {name: reason_of(path) for name, path in files.items() if path.exists()}


def reason_of(failure: Path) -> str:
    """The reason in a file of ``failure_file``, in one line."""
    lines = failure.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[0] if lines else "the reason is not known"


def decoding_text(decoding: Decoding) -> str:
    """A text that is the same for equal decoding settings."""
    return repr(decoding)


def _file(folder: Path, name: str) -> Path:
    return folder / RESULTS / f"{name}.json"


def _read(path: Path) -> Record | None:
    if not path.exists():
        return None
    found = read_json(path, _ADVICE)
    with reading(path, _ADVICE):
        results = {setting: _result(result) for setting, result in found.pop("results").items()}
        return Record(**found, results=results)


def _result(found: Mapping[str, Any]) -> Result:
    captions = {int(image_id): str(caption) for image_id, caption in found["captions"].items()}
    true = found["true"]
    if true is not None:
        true = {int(image_id): bool(value) for image_id, value in true.items()}
    return Result(found["decoding"], captions, true, float(found["images_per_second"]))
