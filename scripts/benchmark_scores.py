"""Benchmark of scoring against the official COCO tools: wall-clock time and memory of complete processes."""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from measuring import Row

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
# A small process in between: the system counts the memory of the process that starts a program as that of the program.
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)
sys.exit(code)
"""
REPORT = """
print(",".join(f"{name}={values[name]:.12f}" for name in sorted(values)))
"""


class _Run(NamedTuple):
    """A run of a program: wall-clock and CPU time in seconds, memory of its largest process in MB, its last line."""

    seconds: float
    cpu: float
    memory: float
    line: str


def score(options: argparse.Namespace) -> list[Row]:
    """Times both programs in interleaved rounds and compares their scores.

    The official tools, which need Java, are left out if there is none.
    """
    if len(options.files) != 2:
        sys.exit("benchmark.py score: give a file of captions and a file of references in COCO's format")
    programs = {"ours": OURS} | ({"theirs": THEIRS} if shutil.which("java") else {})
    if "theirs" not in programs:
        print("without the official tools: java is not installed")
    for title, with_meteor, cold in (
        ("first scoring, which compiles METEOR's tables", True, True),
        ("with METEOR", True, False),
        ("without METEOR", False, False),
    ):
        sides = {name: f"with_meteor = {with_meteor}\n{code}{REPORT}" for name, code in programs.items()}
        if with_meteor and not cold:
            _run(sides["ours"], options.files, {})  # compiles them in the usual cache folder, if necessary
        found: dict[str, list[_Run]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, code in sides.items():
                with tempfile.TemporaryDirectory() as empty:
                    found[name].append(_run(code, options.files, {"IMGCAP_CACHE": empty} if cold else {}))
        print(title)
        median = {name: statistics.median(run.seconds for run in runs) for name, runs in found.items()}
        for name, runs in found.items():
            cpu = statistics.median(run.cpu for run in runs)
            memory = max(run.memory for run in runs)
            print(f"  {name}: {median[name]:.2f} s, {cpu:.2f} s of CPU time, {memory:.0f} MB in the largest process")
        if "theirs" in found:
            print(f"  {median['theirs'] / median['ours']:.1f} times as fast")
            difference = _difference(found["ours"][0].line, found["theirs"][0].line)
            print(f"  largest difference between the scores: {difference:.1e}")
    return []


def _run(code: str, files: list[str], environment: dict[str, str]) -> _Run:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, sys.executable, "-c", code, *files],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    if done.returncode:
        sys.exit(f"benchmark.py score: this program failed; run it by hand to see the error:\n{code}")
    *_, line, usage = done.stdout.strip().split("\n")
    cpu, memory = map(float, usage.split())
    return _Run(time.perf_counter() - start, cpu, memory, line)


def _difference(one: str, other: str) -> float:
    pairs = zip(one.split(","), other.split(","), strict=True)
    return max(abs(float(a.split("=")[1]) - float(b.split("=")[1])) for a, b in pairs)
