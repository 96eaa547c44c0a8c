"""Exported runs: the same captions, usable as runs, no paths of this machine, never trained further in place."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgcap_jax.captioner import Captioner
from imgcap_jax.cli.main import main
from imgcap_jax.data.sources import open_source
from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.concatenated import Concatenated
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.models.model import split_trained
from imgcap_jax.run.evaluation import evaluate
from imgcap_jax.run.exporting import _without_paths, export_run
from imgcap_jax.run.folder import Run
from imgcap_jax.train import train
from imgcap_jax.training.checkpoints import restore_best
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.parameter_file import read_parameters, write_parameters


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_run(Run.load(trained), folder, dtype="float32")
    return folder


def test_an_exported_run_captions_and_is_evaluated_as_the_run(
    trained: Path, exported: Path, tiny_data: Path, tmp_path: Path
) -> None:
    photos = [example.image for example in open_source("scenes", "test", tiny_data)]
    ours, theirs = (Captioner.load(folder)(photos) for folder in (trained, exported))
    assert [one.text for one in ours] == [one.text for one in theirs]
    run = Run.load(exported)
    run = replace(run, experiment=replace(run.experiment, data=replace(run.experiment.data, data_dir=tiny_data)))
    before, after = (evaluate(one, "test", cache=tmp_path, write=False) for one in (Run.load(trained), run))
    assert before.scores.values == after.scores.values
    assert before.steps == after.steps


def test_an_exported_run_is_a_start_but_cannot_be_resumed(exported: Path, tiny_data: Path, tmp_path: Path) -> None:
    experiment = Run.load(exported).experiment
    data = replace(experiment.data, data_dir=tiny_data)
    experiment = replace(experiment, data=data, training=replace(experiment.training, epochs=0.2))
    with pytest.raises(UserError, match="is an exported run, which cannot be trained further in its folder"):
        train(experiment, exported, cache=tmp_path, show=lambda line: None)
    lines: list[str] = []
    train(experiment, tmp_path / "run", cache=tmp_path, init_from=exported, show=lines.append)
    assert any("51 of 51 words are in its vocabulary" in line for line in lines)


def test_an_exported_run_has_no_paths_of_this_machine(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    scores = {"scores": {"CIDEr-D": 0.1}, "dataset": "scenes", "split": "val", "init_from": str(tmp_path / "start")}
    (source / "scores_val.json").write_text(json.dumps(scores))
    run = replace(Run.load(source), init_from=tmp_path)
    export_run(run, tmp_path / "model")
    for path in (tmp_path / "model").rglob("*"):
        assert str(tmp_path).encode() not in path.read_bytes()
        assert str(run.experiment.data.data_dir).encode() not in path.read_bytes()
    assert json.loads((tmp_path / "model" / "scores_val.json").read_text())["init_from"] == "start"


def test_links_and_paths_in_settings_are_not_exported(trained: Path, tmp_path: Path) -> None:
    source, secret = tmp_path / "source", tmp_path / "secret.json"
    shutil.copytree(trained, source)
    secret.write_text('{"token": 1}')
    (source / "scores_val.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"scores_val\.json is a link or not a file"):
        export_run(Run.load(source), tmp_path / "model")
    (source / "scores_val.json").unlink()
    (source / "scores_val.json").write_text('{"dataset": 3}')
    with pytest.raises(UserError, match=r"scores_val\.json"):
        export_run(Run.load(source), tmp_path / "model")
    (source / "scores_val.json").unlink()
    run = Run.load(source)
    lite = EfficientNetLite(weights="/home/me/weights.pth")
    hidden = replace(run, experiment=replace(run.experiment, encoder=Concatenated((lite, lite))))
    with pytest.raises(UserError, match=r"has the path /home/me/weights\.pth in encoder\.encoders\.0\.weights"):
        _without_paths(hidden)
    taught = CrossEntropy(teachers=("/home/me/runs/teacher",))
    found = _without_paths(replace(run, experiment=replace(run.experiment, objective=taught)))
    assert found.objective.teachers == ("teacher",)  # type: ignore[attr-defined]
    assert not (tmp_path / "model").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_search_that_compares_photos_takes_its_index_along(trained: Path, tmp_path: Path) -> None:
    run = Run.load(trained)
    chosen = replace(run.experiment.decoding, rerank="mbr", mbr_neighbours=3, beam=3)
    with pytest.raises(UserError, match=r"document_frequencies\.npz is missing; evaluate the run"):
        export_run(replace(run, experiment=replace(run.experiment, decoding=chosen)), tmp_path / "model")


def test_the_card_is_what_the_hub_reads(trained: Path, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    assert main(["export", str(trained), str(tmp_path / "model")]) == 0
    _, header, text = (tmp_path / "model" / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(header)
    assert about["pipeline_tag"] == "image-to-text"
    assert about["datasets"] == ["scenes"]
    assert "SmallCNN, trained" in text
    library = pytest.importorskip("huggingface_hub", reason="checks the card")
    assert library.ModelCard.load(tmp_path / "model" / "README.md").data.library_name == "imgcap_jax"


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_parameters_are_rounded_to_the_type(trained: Path, tmp_path: Path, dtype: str, error: float) -> None:
    run = Run.load(trained)
    params, step = restore_best(trained, split_trained(run.model(with_encoder=True, restored=True))[1])
    write_parameters(tmp_path / "file", params, step, dtype)  # type: ignore[arg-type]
    found, of_step = read_parameters(tmp_path / "file", params, lambda values, leaf: values)
    assert of_step == step
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=error, atol=1e-7 if error else 0)
        assert theirs.dtype == np.float32


def test_damaged_files_and_other_models_are_refused(tmp_path: Path) -> None:
    params = {"a": jnp.ones((2, 3)), "b": jnp.zeros(4)}
    path = tmp_path / "file"

    def message(template: object = params) -> str:
        with pytest.raises(UserError) as raised:
            read_parameters(path, template, lambda values, leaf: values)
        return str(raised.value)

    write_parameters(path, params, 7, "float32")
    assert "b is missing in the file" not in message({"a": jnp.ones((3, 2)), "b": jnp.zeros(4)})
    assert "a is [2, 3] in the file and [3, 2] in the model" in message({"a": jnp.ones((3, 2)), "b": jnp.zeros(4)})
    assert "b is [4] in the file and missing in the model" in message({"a": jnp.ones((2, 3))})
    data = path.read_bytes()
    for change in (data[:-1], data[:20], b"", data.replace(b"imgcap_jax", b"imgcap_jix")):
        path.write_bytes(change)
        assert "file is damaged" in message()
    with pytest.raises(UserError, match="a does not fit float16; use --dtype float32"):
        write_parameters(path, {"a": jnp.full(2, 1e6)}, 7, "float16")


def test_what_cannot_be_shared_is_refused(trained: Path, exported: Path, refused: Callable[..., str]) -> None:
    assert f"{exported} exists; give a new folder" in refused(["export", str(trained), str(exported)])
    assert "is not a run" in refused(["export", str(exported.parent), str(exported.parent / "new")])
    assert not (exported.parent / "new").exists()
