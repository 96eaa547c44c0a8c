"""The results of a study's runs, one file per run, from which the table is computed."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.files import read_json, reading, write_text

RESULTS = "results"
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
        dataset, split: what was captioned. fingerprint: of these data.
        step: the step of its best parameters.
        parameters: the number of trained parameters.
        minutes: the time of training, with validations and compilation. That of a population is divided by its members.
        captions_per_second: the speed of training. That of a population is the sum over its members.
        together: the number of runs that were trained in the same program.
        results: the name of the setting -> its result.
    """

    seed: int
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
        (folder / RESULTS).mkdir(exist_ok=True)
        write_text(folder / RESULTS / f"{name}.json", json.dumps(asdict(self), indent=1) + "\n")


def read_record(folder: Path, name: str) -> Record | None:
    """The record of the run ``name`` of the study in the folder; None if there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / RESULTS / f"{name}.json"
    if not path.exists():
        return None
    found = read_json(path, _ADVICE)
    with reading(path, _ADVICE):
        results = {setting: _result(result) for setting, result in found.pop("results").items()}
        return Record(**found, results=results)


def finished_runs(folder: Path) -> dict[str, int]:
    """The files of all records in the folder of a study, each with the time of its last change (ns)."""
    return {path.name: path.stat().st_mtime_ns for path in sorted((folder / RESULTS).glob("*.json"))}


def _result(found: Mapping[str, Any]) -> Result:
    captions = {int(image_id): str(caption) for image_id, caption in found["captions"].items()}
    true = found["true"]
    if true is not None:
        true = {int(image_id): bool(value) for image_id, value in true.items()}
    return Result(found["decoding"], captions, true, float(found["images_per_second"]))


def decoding_text(decoding: Decoding) -> str:
    """A text that is the same for equal decoding settings."""
    return repr(decoding)
