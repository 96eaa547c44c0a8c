"""Runs on the Hugging Face Hub, against a local server that speaks its protocol."""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax.captioner import Captioner
from imgcap_jax.cli.main import main
from imgcap_jax.data.sources import open_source
from imgcap_jax.errors import UserError
from imgcap_jax.run.folder import Run
from imgcap_jax.run.hub import hub_name, run_place

_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).parent.parent / "hub_server.py")
assert _spec is not None
assert _spec.loader is not None
hub_server = importlib.util.module_from_spec(_spec)
sys.modules["hub_server"] = hub_server
_spec.loader.exec_module(hub_server)
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub itself
constants = pytest.importorskip("huggingface_hub.constants", reason="the Hub needs huggingface_hub")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with hub_server.serving() as found:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "cache"))
        yield found


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def photos(run: Path, data: Path) -> list[bytes]:
    return [example.image for example in open_source("scenes", "test", data)]


def test_a_run_on_the_hub_writes_the_same_captions(trained: Path, tiny_data: Path, tmp_path: Path, hub: Any) -> None:
    assert main(["push", str(trained), "me/scenes", "--private", "--dtype", "float32"]) == 0
    assert set(hub.files("me/scenes")) >= {"experiment.json", "vocabulary.json", "model.safetensors", "README.md"}
    assert hub.private == {"me/scenes"}
    everything = b"".join(hub.files("me/scenes").values())
    assert str(trained).encode() not in everything  # no path of this machine
    assert str(tiny_data).encode() not in everything
    expected = [one.text for one in Captioner.load(trained)(photos(trained, tiny_data))]
    captioner = Captioner.load("hf://me/scenes")
    assert [one.text for one in captioner(photos(trained, tiny_data))] == expected
    assert main(["pull", "me/scenes", str(tmp_path / "pulled")]) == 0
    pulled = Captioner.load(tmp_path / "pulled")
    assert [one.text for one in pulled(photos(trained, tiny_data))] == expected


def test_a_second_push_replaces_the_files_and_keeps_a_card_that_was_edited(
    trained: Path, tmp_path: Path, hub: Any
) -> None:
    assert main(["export", str(trained), str(tmp_path / "exported")]) == 0
    (tmp_path / "exported" / "README.md").write_text("my card")
    assert main(["push", str(tmp_path / "exported"), "me/scenes"]) == 0
    first = hub.models["me/scenes"][-1][0]
    assert hub.files("me/scenes")["README.md"] == b"my card"
    hub.commit("me/scenes", {**hub.files("me/scenes"), "scores_old.json": b"{}", "notes.txt": b"of the owner"})
    assert main(["push", str(tmp_path / "exported"), "me/scenes", "--dtype", "float32"]) == 0
    files = hub.files("me/scenes")
    assert "scores_old.json" not in files
    assert files["notes.txt"] == b"of the owner"
    # A commit can still be read, and files that are not those of an exported run are not copied.
    old = Run.load(run_place(f"hf://me/scenes@{first}"))
    assert (old.folder / "model.safetensors").read_bytes() == hub.models["me/scenes"][1][1]["model.safetensors"]
    new = Run.load(run_place("hf://me/scenes"))
    assert (new.folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert not (new.folder / "notes.txt").exists()


def test_a_copy_is_used_when_the_hub_is_gone(trained: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["push", str(trained), "me/scenes"]) == 0
    words = Run.load(run_place("hf://me/scenes")).vocabulary.words
    first = hub.models["me/scenes"][-1][0]
    # A download that is cut off leaves nothing that is taken for a copy.
    hub.commit("me/scenes", {**hub.files("me/scenes"), "scores_new.json": b"{}"})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            run_place("hf://me/scenes")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = Run.load(run_place("hf://me/scenes"))
    assert found.vocabulary.words == words
    assert found.folder.name == first
    assert hub_name(found.folder) == "me/scenes"
    with pytest.raises(UserError, match=r"hf://me/other can't be read"):
        Run.load(run_place("hf://me/other"))


def test_a_new_commit_is_a_new_copy(trained: Path, hub: Any) -> None:
    assert main(["push", str(trained), "me/scenes"]) == 0
    hub.commit("me/scenes", {**hub.files("me/scenes"), "confidence.json": b"{}"})
    old = run_place("hf://me/scenes")
    assert (old / "confidence.json").exists()
    files = {name: data for name, data in hub.files("me/scenes").items() if name != "confidence.json"}
    hub.commit("me/scenes", files)
    new = run_place("hf://me/scenes")
    assert new != old
    assert not (new / "confidence.json").exists()
    assert run_place(f"hf://me/scenes@{old.name}") == old


def test_nothing_secret_is_published_and_nothing_foreign_is_replaced(
    trained: Path, hub: Any, refused: Callable[..., str]
) -> None:
    assert main(["push", str(trained), "me/public"]) == 0
    commits = len(hub.models["me/public"])
    assert "me/public is public, and --private does not" in refused(["push", str(trained), "me/public", "--private"])
    assert len(hub.models["me/public"]) == commits
    hub.models["me/other"] = []
    hub.commit("me/other", {"config.json": b"{}", "model.safetensors": b"x", "README.md": b"a card"})
    assert "me/other contains config.json, but no run of imgcap_jax" in refused(["push", str(trained), "me/other"])
    assert hub.files("me/other")["README.md"] == b"a card"


def test_mistakes_are_explained(
    trained: Path, tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    assert "is not a name on the Hugging Face Hub" in refused(["pull", "name"])
    assert "is not a name on the Hugging Face Hub" in refused(["pull", "me/name@.."])
    assert "hf://me/none can't be read (it does not exist, or it is private" in refused(["pull", "me/none"])
    assert "a revision is made by the push" in refused(["push", str(trained), "me/scenes@v1"])
    assert main(["push", str(trained), "me/scenes"]) == 0
    assert "has no such revision" in refused(["pull", "me/scenes@v9", str(tmp_path / "new")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "full exists" in refused(["pull", "me/scenes", str(tmp_path / "full")])
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "can't be written" in refused(["push", str(trained), "me/scenes"])


def test_damaged_or_hostile_files_are_refused(trained: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert main(["export", str(trained), str(tmp_path / "exported")]) == 0
    photo = tmp_path / "photo.png"
    shutil.copyfile(Path(__file__).parents[2] / "docs" / "images" / "scenes.png", photo)

    def message(change: Callable[[Path], None]) -> str:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "exported", folder)
        change(folder)
        return refused(["caption", str(photo), "--run", str(folder)])

    def cut(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-100])

    def rename_class(folder: Path) -> None:
        text = (folder / "experiment.json").read_text()
        (folder / "experiment.json").write_text(text.replace("imgcap_jax.decoding.settings:Decoding", "os:system"))

    def widen(folder: Path) -> None:
        text = (folder / "experiment.json").read_text()
        (folder / "experiment.json").write_text(re.sub(r'"hidden_size": \d+', '"hidden_size": 24', text))

    assert "model.safetensors" in message(cut)
    assert "os" in message(rename_class)
    assert "in the file and" in message(widen)
