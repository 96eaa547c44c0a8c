"""A run as a compiled program (StableHLO, ONNX): the loader, alone, writes the captions of the run."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.captioner import Captioner
from imgcap_jax.cli.main import main
from imgcap_jax.data.sources import open_source
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.programs import loader
from imgcap_jax.programs.common import LOADER
from imgcap_jax.run.folder import Run

# Stands for an environment without imgcap_jax and everything that it needs, except what the loader needs.
_ALONE = """
import sys

BLOCKED = sys.argv.pop(1).split(",")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("imgcap_jax", "flax", "optax", "orbax", "safetensors", "simplejpeg", *BLOCKED):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def photos(folder: Path, data: Path) -> list[Path]:
    """Drawings as PNG, a large JPEG, one that lies on its side, and one with transparency."""
    files = []
    for number, example in enumerate(open_source("scenes", "test", data)):
        path = folder / f"{number}.png"
        path.write_bytes(example.image)
        picture = Image.open(path).convert("RGB").resize((300, 200))
        exif = Image.Exif()
        if number == 1:
            picture.save(path := path.with_suffix(".jpg"), quality=95)
        elif number == 2:
            exif[0x0112] = 6
            picture.save(path := path.with_suffix(".jpg"), exif=exif)
        elif number == 3:
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
            picture.save(path)
        files.append(path)
    return files


@pytest.mark.parametrize("kind", ["imgcap", "onnx"])
def test_the_loader_alone_writes_the_captions_of_the_run(
    trained: Path, tiny_data: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "onnx":
        pytest.importorskip("jax2onnx", reason="writes ONNX files")
        pytest.importorskip("onnxruntime", reason="runs ONNX files")
    else:
        pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")
    path = tmp_path / f"model.{kind}"
    options = ["--beam", "3", "--decode.forbid-repeated-words", "true"]
    kept = [] if kind == "onnx" else ["--dtype", "float32"]
    assert main(["export", str(trained), str(path), *kept, *options]) == 0
    files = photos(tmp_path, tiny_data)
    blocked = "jax,jaxlib,ml_dtypes" if kind == "onnx" else "onnxruntime"
    command = [sys.executable, "-c", _ALONE, blocked, str(LOADER), str(path), *map(str, files)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    captions = Captioner.load(trained, decoding=Decoding(beam=3, forbid_repeated_words=True))(files)
    assert found == [f"{file}: {caption.text}" for file, caption in zip(files, captions, strict=True)]
    assert len({caption.text for caption in captions}) > 1


def test_a_file_can_be_written_again_by_a_newer_version(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    scores = {"dataset": "scenes", "split": "val", "scores": {"CIDEr-D": 0.5}}
    (source / "scores_val.json").write_text(json.dumps(scores))
    old, new = tmp_path / "old.imgcap", tmp_path / "new.imgcap"
    assert main(["export", str(source), str(old), "--dtype", "float32", "--beam", "3", "--n-best", "2"]) == 0
    assert main(["export", str(old), str(new)]) == 0
    with zipfile.ZipFile(old) as before, zipfile.ZipFile(new) as after:
        assert before.namelist() == after.namelist()
        assert "scores_val.json" in before.namelist()
        for name in before.namelist():
            if name != "program.stablehlo":
                assert before.read(name) == after.read(name), name
    assert main(["export", str(old), str(tmp_path / "folder")]) == 0
    run = Run.load(tmp_path / "folder")
    assert (run.experiment.decoding.beam, run.experiment.decoding.n_best) == (3, 2)


def test_the_loader_returns_finished_captions_only(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")
    path = tmp_path / "model.imgcap"
    assert main(["export", str(trained), str(path), "--dtype", "float32", "--beam", "4", "--n-best", "2"]) == 0
    files = photos(tmp_path, tiny_data)[:4]
    expected = Captioner.load(trained, decoding=Decoding(beam=4, n_best=2)).n_best(files)
    program = loader.Program(str(path))
    for found, captions in zip(program([str(file) for file in files]), expected, strict=True):
        assert [text for text, _ in found] == [caption.text for caption in captions]
        np.testing.assert_allclose([value for _, value in found], [one.log_prob for one in captions], atol=1e-3)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        program([str(tmp_path / "deep.png")])


def test_what_a_program_cannot_do_is_refused(trained: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = str(tmp_path / "model.imgcap")
    assert "rerank needs files of the training data" in refused(
        ["export", str(trained), path, "--beam", "3", "--decode.rerank", "mbr"]
    )
    assert "decoding options are for a program" in refused(["export", str(trained), str(tmp_path / "x"), "--beam", "5"])
    assert "an ONNX file contains float32" in refused(
        ["export", str(trained), path[:-7] + ".onnx", "--dtype", "float16"]
    )
    (tmp_path / "bad.imgcap").write_bytes(b"no zip")
    assert "bad.imgcap exists; give a new file" in refused(["export", str(trained), str(tmp_path / "bad.imgcap")])
    assert "give a file that imgcap export wrote" in refused(["export", str(tmp_path / "bad.imgcap"), path])
    assert not Path(path).exists()
