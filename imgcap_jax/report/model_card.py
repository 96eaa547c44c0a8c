"""The model card of an exported run, in the format of the Hugging Face Hub (https://huggingface.co/docs/hub/model-cards)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from imgcap_jax import __version__
from imgcap_jax.data.regions import has_ready_regions
from imgcap_jax.data.sources import parse_mixture
from imgcap_jax.experiment import Experiment
from imgcap_jax.files import read_json, reading
from imgcap_jax.run.exporting import SCORES
from imgcap_jax.run.folder import Run
from imgcap_jax.training.parameter_file import PARAMETERS

# The Hub's name of each metric, and the factor of the score in a table.
_HUB_METRICS = {"BLEU-4": "bleu", "METEOR": "meteor", "ROUGE-L": "rouge", "CIDEr-D": "cider"}


def model_card(run: Run, name: str) -> str:
    """The card, as Markdown after a header in YAML.

    Args:
        run: an exported run, in its folder.
        name: of the model.

    Raises:
        UserError: the scores of the run cannot be read.
    """
    results = [read_json(path, "evaluate the run again") for path in sorted(run.folder.glob(SCORES))]
    with reading(run.folder / SCORES, "evaluate the run again"):
        return _card(run, name, results)


def _card(run: Run, name: str, results: Sequence[Mapping[str, Any]]) -> str:
    datasets = list(dict.fromkeys(dataset for dataset, _ in parse_mixture(run.experiment.data.dataset)))
    header: dict[str, Any] = {
        "library_name": "imgcap_jax",
        "pipeline_tag": "image-to-text",
        "tags": ["image-captioning", "jax"],
        "datasets": datasets,
        "metrics": sorted(set(_HUB_METRICS.values())),
    }
    if results:
        header["model-index"] = [{"name": name, "results": [_hub_result(one) for one in results]}]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name}",
        f"An image captioning model of [imgcap_jax]({_HOME}) {__version__}.",
        _usage(),
        f"## Model\n\n{_model(run.experiment, run.folder)}",
        f"## Training data\n\nThe captioned photos of {' and '.join(datasets)}. Their licences apply to uses of the "
        f"model.",
        f"## Scores\n\n{_scores(results)}",
        "## Limitations\n\nThe model describes every photo in the words of its training captions, also things that it "
        "has never seen. Descriptions of people can be wrong and can repeat prejudices of the captions. Do not rely on "
        "a caption that nobody has checked.",
    ]
    return "\n\n".join(parts) + "\n"


_HOME = "https://pypi.org/project/imgcap_jax"


def _usage() -> str:
    return """## Use

```bash
imgcap caption photo.jpg --run THIS_FOLDER
```

```python
from imgcap_jax.captioner import Captioner

captioner = Captioner.load("THIS_FOLDER")
print(captioner(["photo.jpg"])[0].text)
```"""


def _model(experiment: Experiment, folder: Path) -> str:
    size = (folder / PARAMETERS).stat().st_size
    encoder = type(experiment.encoder).__name__
    lines = [
        f"- encoder: {encoder}" + ("" if has_ready_regions(experiment.encoder) else _state(experiment)),
        f"- decoder: {type(experiment.decoder).__name__}",
        f"- objective of the last stage: {experiment.objective.title}",
        f"- trained parameters: `{PARAMETERS}`, {size / 1e6:.1f} MB",
        "- all settings: `experiment.json`",
    ]
    return "\n".join(lines)


def _state(experiment: Experiment) -> str:
    side = experiment.data.image_size
    return f", {'frozen' if experiment.encoder.frozen else 'trained'}, {side} x {side} pixels"


def _hub_result(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "task": {"type": "image-to-text", "name": "Image captioning"},
        "dataset": {"name": result["dataset"], "type": result["dataset"], "split": result["split"]},
        "metrics": [
            {"type": kind, "name": name, "value": round(100 * float(result["scores"][name]), 1)}
            for name, kind in _HUB_METRICS.items()
            if name in result["scores"]
        ],
    }


def _scores(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "Not evaluated yet."
    names = [name for name in results[0]["scores"] if all(name in one["scores"] for one in results)]
    rows = ["| dataset | split | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    for one in results:
        values = " | ".join(f"{100 * float(one['scores'][name]):.1f}" for name in names)
        rows.append(f"| {one['dataset']} | {one['split']} | {values} |")
    about = [
        f"- {one['dataset']}, {one['split']}: `{one.get('signature', '')}`; {_decoding(one.get('decoding', {}))}"
        for one in results
    ]
    return "\n".join([*rows, "", *about])


def _decoding(settings: Mapping[str, Any]) -> str:
    shown = {name: settings[name] for name in ("beam", "length_norm", "rerank", "samples") if settings.get(name)}
    return json.dumps(shown).strip("{}").replace('"', "")
