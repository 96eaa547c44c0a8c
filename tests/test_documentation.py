"""Every code block of the README and of docs/ is run.

Python blocks are executed. Commands are run on a small run and small datasets that stand for those they name, with a
few exceptions. Training and feature extraction end when the command line and the experiment are read. COCO, Flickr8k
and Flickr30k are not prepared. Nothing is sent to the Hugging Face Hub, and no page is served. Of other programs, it is
only checked that what they name exists.
"""

import configparser
import json
import os
import re
import shlex
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from imgcap_jax.cli.main import main
from imgcap_jax.data.scenes.language import scene_captions
from imgcap_jax.data.scenes.world import draw_scene, sample_scene
from imgcap_jax.experiment import Experiment
from imgcap_jax.metrics.meteor.tables import HOW_TO_ADD
from imgcap_jax.models.neighbours import NEIGHBOURS, index
from imgcap_jax.plan.chips import CHIPS
from imgcap_jax.programs.common import LOADER
from imgcap_jax.run.folder import INIT_FROM, Run
from imgcap_jax.run.knowledge import identity
from imgcap_jax.special_tokens import UNK
from imgcap_jax.study import Study

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
Blocks = Callable[[Path], list[tuple[str, str, int]]]

# What the small run and datasets cannot offer, and what stands for it.
STANDS_FOR = {
    "dog|dogs,frisbee": "circle|circles,red",
    "FOLDER": "photos",
    "~/flickr8k": "photos",
    "~/coco_subset": "photos",
    "HOST:PORT,COUNT,INDEX": "127.0.0.1:1234,2,0",
    "gs://BUCKET/runs/coco": "runs/another",
    "gs://BUCKET/data": "data",
    "hf://USER/NAME": "runs/another",
}


@pytest.fixture(scope="module")
def neighbours(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of similar training photos for the small run, whose encoder is not frozen, so that it makes none."""
    run = Run.load(trained)
    encoder = run.model(with_encoder=True).encoder
    assert encoder is not None
    rng = np.random.default_rng(0)
    captions = rng.integers(UNK + 1, len(run.vocabulary), (30, 2, 8)).astype(np.int32)
    path = tmp_path_factory.mktemp("neighbours") / NEIGHBOURS
    index(rng.normal(size=(30, encoder.region_size)).astype(np.float32), captions).save(path, identity(run))
    return path


@pytest.fixture
def place(
    trained: Path,
    neighbours: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forget_code: Callable[[], None],
) -> Path:
    """A folder with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_data, "data")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    populations = [f"{name}_population/seed=0" for name in ("flickr8k", "narrow", "wide")]
    for name in ("flickr8k", "flickr8k_scst", "flickr8k_coco", "another", "my_experiment", *populations):
        shutil.copytree(trained, Path("runs") / name)
        shutil.copyfile(neighbours, Path("runs") / name / NEIGHBOURS)
    shutil.copytree(trained, Path("runs") / "my_study" / "base" / "seed=0")
    for name in ("flickr8k_scst_population", "flickr8k_coco_scst_population"):
        for seed in range(3):
            folder = Path("runs") / name / f"seed={seed}"
            shutil.copytree(trained, folder)
            shutil.copyfile(neighbours, folder / NEIGHBOURS)
            (folder / INIT_FROM).write_text(json.dumps({"run": "runs/start"}))
    for folder in ("holiday", "test2014", "photos/images"):
        Path(folder).mkdir(parents=True)
    scenes = {number: sample_scene("test", number) for number in range(8)}
    for number, scene in scenes.items():
        picture = Image.fromarray(draw_scene(scene, 64))
        picture.save(f"photos/images/{number}.png")
        picture.save(f"test2014/COCO_test2014_{number:012}.jpg")
    for name in ("photo.jpg", "dog.jpg", "beach.jpg", "holiday/one.jpg"):
        picture.save(name)
    texts = {number: scene_captions(scene, 0) for number, scene in scenes.items()}
    karpathy = [
        {
            "filename": f"{number}.png",
            "imgid": number,
            "split": ("train", "val")[number % 2],
            "sentences": [{"raw": text, "sentid": 10 * number + i} for i, text in enumerate(captions)],
        }
        for number, captions in texts.items()
    ]
    Path("photos/dataset_flickr8k.json").write_text(json.dumps({"images": karpathy, "dataset": "flickr8k"}))
    for name, which in (("captions", 0), ("other", 1), ("val", 0)):
        results = [{"image_id": number, "caption": captions[which]} for number, captions in texts.items()]
        Path(f"{name}.json").write_text(json.dumps(results))
    annotations = [{"image_id": n, "id": n, "caption": text} for n, captions in texts.items() for text in captions[2:]]
    for name in ("references", "references_train"):
        Path(f"{name}.json").write_text(json.dumps({"annotations": annotations}))
    sets = [
        {"image_id": number, "captions": [{"caption": text} for text in captions]} for number, captions in texts.items()
    ]
    Path("n_best_val.json").write_text(json.dumps(sets))
    ratings = [f'{number},"{captions[0]}",{number % 4}' for number, captions in texts.items()]
    Path("ratings.csv").write_text("\n".join(["image,caption,rating", *ratings]))
    return tmp_path


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Experiment]:
    """The experiments that commands would have trained, planned, or extracted features for."""
    import imgcap_jax.ablation.estimate
    import imgcap_jax.ablation.records
    import imgcap_jax.ablation.runner
    import imgcap_jax.cli.runs
    import imgcap_jax.cli.serve
    import imgcap_jax.data.prepare
    import imgcap_jax.plan.plan
    import imgcap_jax.plan.topology
    import imgcap_jax.population
    import imgcap_jax.run.confidence
    import imgcap_jax.run.extraction
    import imgcap_jax.run.folder
    import imgcap_jax.run.hub
    import imgcap_jax.train
    import imgcap_jax.training.parallel
    import imgcap_jax.training.writers.find

    asked: list[Experiment] = []

    def train(experiment: Experiment, folder: Path, **_: Any) -> Any:
        asked.append(experiment)
        return imgcap_jax.train.Outcome(1, 0.5, None)

    def train_population(variants: Any, folder: Path, **_: Any) -> Any:
        assert len(variants) > 1
        return {variant.name: train(variant.experiment, folder) for variant in variants}

    def make_plan(experiment: Experiment, sizes: Any, topology: Any, **_: Any) -> Any:
        asked.append(experiment)
        return imgcap_jax.plan.plan.Plan(topology, {}, {}, sizes.images, 1.0, None, ())

    def open_topology(name: str, dtype: Any) -> Any:
        assert name == "local" or imgcap_jax.plan.topology.slice_name(name)
        return imgcap_jax.plan.topology.Topology(name, jax.devices()[:1], CHIPS["TPU v5 lite"], (1, 1), "a test")

    def ablate(study: Study, folder: Path, **_: Any) -> Any:
        asked.append(study.base)
        return imgcap_jax.ablation.runner.Ablation()

    monkeypatch.setattr(imgcap_jax.cli.serve, "serve", lambda captioner, options: 0)  # it has no end
    too_few = imgcap_jax.run.confidence.Confidence(0.0, 0.1, 0.0, decoding={})  # images to fit it to
    monkeypatch.setattr(imgcap_jax.run.confidence, "calibrate", lambda evaluations: too_few)
    monkeypatch.setattr(imgcap_jax.run.hub, "upload", lambda *_, **__: "https://huggingface.co")
    monkeypatch.setattr(imgcap_jax.run.hub, "download", lambda name, revision, to: shutil.copytree("runs/another", to))
    monkeypatch.setattr(imgcap_jax.run.folder, "_SHIPPED", Path("runs/another"))
    monkeypatch.setattr(imgcap_jax.cli.runs, "_watch", lambda folder, sort: None)  # it has no end
    monkeypatch.setattr(imgcap_jax.training.writers.find, "_is_installed", lambda package: True)
    monkeypatch.setattr(imgcap_jax.ablation.runner, "ablate", ablate)
    monkeypatch.setattr(imgcap_jax.ablation.runner, "check_study", lambda study, folder, init_from: None)
    monkeypatch.setattr(imgcap_jax.ablation.runner, "missing_results", lambda run, folder, source: ["base"])
    monkeypatch.setattr(imgcap_jax.ablation.records, "evaluated_source", lambda study: None)
    monkeypatch.setattr(imgcap_jax.ablation.estimate, "time_runs", lambda runs, **_: [])
    monkeypatch.setattr(imgcap_jax.plan.plan, "make_plan", make_plan)
    monkeypatch.setattr(imgcap_jax.plan.topology, "open_topology", open_topology)
    prepare = imgcap_jax.data.prepare.prepare
    monkeypatch.setattr(imgcap_jax.train, "train", train)
    monkeypatch.setattr(imgcap_jax.population, "train_population", train_population)
    monkeypatch.setattr(imgcap_jax.run.extraction, "extract", lambda experiment, *_: asked.append(experiment))
    monkeypatch.setattr(imgcap_jax.training.parallel, "join_processes", lambda where: None)
    monkeypatch.setattr(
        imgcap_jax.data.prepare,
        "prepare",
        lambda data, **options: (
            Path("data") / data / "1.0.0" if data in ("coco", "flickr8k", "flickr30k") else prepare(data, **options)
        ),
    )
    return asked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run(page: Path, place: Path, trainings: list[Experiment], code_blocks: Blocks) -> None:
    blocks = code_blocks(page)
    assert {language for language, _, _ in blocks} <= {"python", "bash"}
    assert blocks
    for language, text, _ in blocks:
        if language == "python" and (found := re.match(r"# (my_\w+\.py)\n", text)):
            (place / found[1]).write_text(text)  # tests/test_own_parts.py runs them
    for language, text, line in blocks:
        if language == "python":
            if not re.match(r"# my_\w+\.py\n", text):
                exec(compile(text, f"{page.name}:{line}", "exec"), {"__name__": "block"})
            continue
        for command in filter(None, (part.split("  #")[0].strip() for part in text.splitlines())):
            _run(command, f"{page.name}:{line}: {command}")


def _run(command: str, where: str) -> None:
    program, *arguments = shlex.split(command, comments=True)
    arguments = [STANDS_FOR.get(argument, argument) for argument in arguments]
    if program.startswith("scripts/"):
        assert os.access(REPOSITORY / program, os.X_OK), where
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(REPOSITORY / "setup.cfg")
        for extra in re.findall(r"\.\[(\w+)\]", command):
            assert extra in setup["options.extras_require"], where
        assert (REPOSITORY / "constraints.txt").is_file()
    elif program in ("python3", "source"):
        assert ".venv" in command, where
    elif program in ("curl", "docker", "unzip", "python"):
        _check(program, arguments, where)
    else:
        assert program == "imgcap", where
        assert main(arguments) == 0, where


def _check(program: str, arguments: list[str], where: str) -> None:
    """Commands that are not run: what they name must exist."""
    if program == "curl":
        from imgcap_jax.web.app import STYLES

        style = re.search(r"/api/caption\?style=(\w+)", arguments[-1])
        assert style is not None, where
        assert style[1] in STYLES, where
    elif program == "docker":
        assert (REPOSITORY / "Dockerfile").is_file(), where
    elif program == "unzip":
        with zipfile.ZipFile(arguments[0]) as file:
            assert set(arguments[1:]) <= set(file.namelist()), where
    else:
        assert arguments[0] == LOADER.name, where
        assert all(Path(name).is_file() for name in arguments[1:]), where


def test_installation_hints_work() -> None:
    """The package is on no index, so its extras are installed from a clone; messages name the packages themselves."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    folders = [REPOSITORY / name for name in ("imgcap_jax", "experiments", "scripts", "docs", "tests")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".md", ".sh")]
    named: set[str] = set()
    for path in [REPOSITORY / "README.md", *files]:
        text = path.read_text()
        assert not re.search(r"(?:pip )?install [\"']?imgcap_jax\[", text), f"{path}: imgcap_jax[...] is on no index"
        for found in re.findall(r"""\.\[([\w,]+)\]["']|\(extra:? `?(\w+)`?\)""", text):
            names = {name for group in found for name in group.split(",") if name}
            assert names <= set(setup["options.extras_require"]), f"{path}: {names}"
            named |= names
    assert {"meteor", "torch"} <= named
    (package,) = re.findall(r"^[\w-]+", setup["options.extras_require"]["meteor"])
    assert HOW_TO_ADD.startswith(f"pip install {package} ")


def test_pages_link_to_what_exists() -> None:
    for page in [*PAGES, REPOSITORY / "BENCHMARKS.md"]:
        for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            if heading:
                assert heading in _anchors(file), f"{page.name}: {target}#{heading}"


def _anchors(page: Path) -> set[str]:
    """The names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.+)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_and_experiments_that_pages_name_exist() -> None:
    from imgcap_jax.cli.experiments import find

    for page in [*PAGES, REPOSITORY / "BENCHMARKS.md"]:
        text = page.read_text()
        for name in re.findall(r"`((?:imgcap_jax|experiments|scripts|tests)/[\w/]+\.(?:py|sh))`", text):
            assert (REPOSITORY / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"imgcap train ((?!my)[a-z][a-z0-9_]*)\b", text):
            assert isinstance(find(name), Experiment)


def test_pictures_of_the_readme_can_be_opened_and_are_not_blank() -> None:
    for name in ("scenes.png", "attention.png"):
        with Image.open(REPOSITORY / "docs" / "images" / name) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 10
