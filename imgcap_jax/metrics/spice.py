"""SPICE (Anderson et al., 2016), computed by the official Java tool if it is installed.

SPICE parses sentences with Stanford's CoreNLP. It therefore needs the official jar and the models of CoreNLP (400 MB).
It takes minutes, the other metrics take seconds, so it is computed only on request.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from imgcap_jax.errors import UserError
from imgcap_jax.metrics.corpus import Candidates, MetricScores, References, mean_score
from imgcap_jax.metrics.official import official_folder

LABEL = "SPICE:1.0"
_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
# The tool's serialiser accesses classes that are closed from Java 16 on. Java 8 ignores JDK_JAVA_OPTIONS.
_OPENED = " ".join(
    f"--add-opens=java.base/java.{package}=ALL-UNNAMED"
    for package in ("lang", "math", "net", "text", "util", "util.concurrent")
)


def obstacle() -> str | None:
    """One line that says why SPICE cannot be computed here and what to do; None if it can be computed."""
    if shutil.which("java") is None:
        return "SPICE needs Java 8 or later on the PATH; the other metrics do not need it"
    folder = _folder()
    if folder is None:
        return "SPICE needs its jar: install it with pip install pycocoevalcap"
    missing = [name for name in _MODELS if not (folder / "lib" / name).is_file()]
    if missing:
        return (
            f"SPICE needs {' and '.join(missing)} in {folder / 'lib'}: "
            "python -m pycocoevalcap.spice.get_stanford_models downloads CoreNLP (400 MB) into this folder"
        )
    return None


def prepare(references: References) -> Callable[[Candidates], MetricScores]:
    """Returns a function that scores candidates against these references.

    Raises:
        UserError: something is missing (see ``obstacle``). The returned function raises it if the tool fails or omits
            an image.
    """
    if reason := obstacle():
        raise UserError(reason)

    def score(candidates: Candidates) -> MetricScores:
        entries = [
            {"image_id": number, "test": " ".join(candidate), "refs": [" ".join(tokens) for tokens in theirs]}
            for number, (candidate, theirs) in enumerate(zip(candidates.tokens, references.tokens, strict=True))
        ]
        found = {result["image_id"]: result["scores"]["All"]["f"] for result in _run(entries)}
        images = np.array([found.get(number) for number in range(len(entries))], float)
        broken = int(np.isnan(images).sum())
        if broken:
            raise UserError(f"SPICE returned no score for {broken} of {len(entries)} captions, so there is no mean")
        return {"SPICE": mean_score(images)}

    return score


def _folder() -> Path | None:
    folder = official_folder("spice")
    return folder if folder is not None and (folder / "spice-1.0.jar").is_file() else None


def _run(entries: list[dict]) -> list[dict]:
    folder = _folder()
    assert folder is not None
    with tempfile.TemporaryDirectory() as temporary:
        given, result = Path(temporary) / "captions.json", Path(temporary) / "scores.json"
        given.write_text(json.dumps(entries), "utf-8")
        command = ["java", "-Xmx8G", "-jar", str(folder / "spice-1.0.jar"), str(given), "-out", str(result)]
        opened = f"{os.environ.get('JDK_JAVA_OPTIONS', '')} {_OPENED}".strip()
        run = subprocess.run(
            [*command, "-subset", "-silent"],
            cwd=folder,  # the folder of the jar, because the tool looks for CoreNLP next to the jar
            env={**os.environ, "JDK_JAVA_OPTIONS": opened},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode or not result.is_file():
            causes = [line.strip() for line in run.stderr.splitlines() if re.search(r"(?:Error|Exception)\b", line)]
            raise UserError(f"SPICE failed ({causes[0] if causes else f'exit code {run.returncode}'})")
        scores: list[dict] = json.loads(result.read_text("utf-8"))
        return scores
