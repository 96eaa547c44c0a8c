"""Benchmark of scoring against the official COCO tools: wall-clock time and memory of complete processes."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

# Each program tokenises one file of captions and computes BLEU, METEOR, ROUGE-L and CIDEr-D.
OURS = """
import sys
from pathlib import Path
from imgcap_jax.metrics.coco_format import read_captions, read_references
from imgcap_jax.metrics.scoring import CaptionScorer, available_metrics
chosen = {name: metric for name, metric in available_metrics().items() if with_meteor or not name.startswith("METEOR")}
captions = {image: found[0] for image, found in read_captions(Path(sys.argv[1])).items()}
values = CaptionScorer(read_references(Path(sys.argv[2])), chosen).score(captions).values
"""
THEIRS = """
import json, sys
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
captions, references = {}, {}
for entry in json.load(open(sys.argv[1])):
    captions[entry["image_id"]] = [{"caption": entry["caption"]}]
for entry in json.load(open(sys.argv[2]))["annotations"]:
    references.setdefault(entry["image_id"], []).append({"caption": entry["caption"]})
tokenizer = PTBTokenizer()
references, captions = tokenizer.tokenize(references), tokenizer.tokenize(captions)
values = {f"BLEU-{n}": value for n, value in enumerate(Bleu(4).compute_score(references, captions, verbose=0)[0], 1)}
scorers = {"ROUGE-L": Rouge, "CIDEr-D": Cider} | ({"METEOR": Meteor} if with_meteor else {})
for name, scorer in scorers.items():
    values[name] = scorer().compute_score(references, captions)[0]
"""
REPORT = """
print(",".join(f"{name}={values[name]:.12f}" for name in sorted(values)))
"""


def score(options: argparse.Namespace) -> None:
    """Times both programs in interleaved rounds and compares their scores."""
    if len(options.files) != 2:
        sys.exit("benchmark.py score: give a file of captions and a file of references in COCO's format")
    for with_meteor in (True, False):
        sides = {
            name: f"with_meteor = {with_meteor}\n{code}{REPORT}" for name, code in (("ours", OURS), ("theirs", THEIRS))
        }
        if with_meteor:
            with tempfile.TemporaryDirectory() as empty:
                seconds, memory, _ = _run(sides["ours"], options.files, {"IMGCAP_CACHE": empty})
            print(f"ours, with the one-time compilation of METEOR's tables: {seconds:.1f} s, {memory:.0f} MB")
            _run(sides["ours"], options.files, {})  # compiles them in the usual cache folder, if necessary
        found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, code in sides.items():
                found[name].append(_run(code, options.files, {}))
        print("with METEOR" if with_meteor else "without METEOR")
        median = {name: statistics.median(run[0] for run in runs) for name, runs in found.items()}
        for name, runs in found.items():
            print(f"  {name}: {median[name]:.2f} s, {max(run[1] for run in runs):.0f} MB in the largest process")
        print(f"  {median['theirs'] / median['ours']:.1f} times as fast")
        print(f"  largest difference between the scores: {_difference(found['ours'][0][2], found['theirs'][0][2]):.1e}")


def _run(code: str, files: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """The wall-clock time in seconds, the memory of the largest process in MB, and the last line printed."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *files],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    lines = process.stdout.read().strip().split("\n")
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"benchmark.py score: this program failed; run it by hand to see the error:\n{code}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024, lines[-1]


def _difference(one: str, other: str) -> float:
    pairs = zip(one.split(","), other.split(","), strict=True)
    return max(abs(float(a.split("=")[1]) - float(b.split("=")[1])) for a, b in pairs)
