"""SPICE: the input and output of the official tool, with a script in place of Java, and errors if parts are missing.

The real jar is not run, because the models of CoreNLP are not available to the tests.
"""

import json
import sys
from pathlib import Path

import pytest

from imgcap_jax.errors import UserError
from imgcap_jax.metrics import spice
from imgcap_jax.metrics.scoring import CaptionScorer

REFERENCES = {7: ["A dog.", "the dog"], 9: ["a cat"]}
CANDIDATES = {7: "a dog", 9: "Two dogs!"}
JAVA = """#!{python}
import json, os, sys
from pathlib import Path
arguments = sys.argv[1:]
entries = json.loads(Path(arguments[3]).read_text())
Path("given.json").write_text(json.dumps([arguments, os.environ["JDK_JAVA_OPTIONS"], entries]))
if os.environ.get("FAIL"):
    sys.exit("NOTE: options\\njava.lang.OutOfMemoryError: Java heap space\\n\\tat a.B\\n\\t... 3 more")
if os.environ.get("NOTHING"):
    entries = entries[:1]
# In a different order from that of the input.
scores = [{{"image_id": e["image_id"], "scores": {{"All": {{"f": len(e["test"]) / 10}}}}}} for e in reversed(entries)]
Path(arguments[arguments.index("-out") + 1]).write_text(json.dumps(scores))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "with spaces" / "spice"
    (folder / "lib").mkdir(parents=True)
    for name in ("spice-1.0.jar", *(f"lib/{name}" for name in spice._MODELS)):
        (folder / name).touch()
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(JAVA.format(python=sys.executable))
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(java.parent))
    monkeypatch.setattr(spice, "_folder", lambda: folder)
    return folder


def test_scores_are_assigned_to_their_images(folder: Path) -> None:
    scores = CaptionScorer(REFERENCES, {spice.LABEL: spice.prepare}).score(CANDIDATES)
    assert scores.per_image["SPICE"] == {7: 0.5, 9: 0.8}
    assert scores.values["SPICE"] == pytest.approx(0.65)
    assert scores.signatures["SPICE"].endswith("n:2|SPICE:1.0")
    arguments, opened, entries = json.loads((folder / "given.json").read_text())
    assert arguments[:3] == ["-Xmx8G", "-jar", str(folder / "spice-1.0.jar")]
    assert "java.base/java.lang=ALL-UNNAMED" in opened
    assert entries == [
        {"image_id": 0, "test": "a dog", "refs": ["a dog", "the dog"]},
        {"image_id": 1, "test": "two dogs", "refs": ["a cat"]},
    ]


def test_a_failure_of_the_tool_gives_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(UserError, match=r"SPICE failed .*Java heap space"):
        CaptionScorer(REFERENCES, {spice.LABEL: spice.prepare}).score(CANDIDATES)


def test_a_caption_without_a_score_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTHING", "1")
    with pytest.raises(UserError, match="no score for 1 of 2 captions"):
        CaptionScorer(REFERENCES, {spice.LABEL: spice.prepare}).score(CANDIDATES)


def test_missing_parts_are_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spice.obstacle() is None
    (folder / "lib" / spice._MODELS[1]).unlink()
    assert "get_stanford_models downloads" in str(spice.obstacle())
    monkeypatch.setattr(spice, "_folder", lambda: None)
    assert "pip install pycocoevalcap" in str(spice.obstacle())
    monkeypatch.setenv("PATH", str(folder))
    assert "Java 8 or later" in str(spice.obstacle())
    with pytest.raises(UserError, match="SPICE needs Java"):
        CaptionScorer(REFERENCES, {spice.LABEL: spice.prepare})
