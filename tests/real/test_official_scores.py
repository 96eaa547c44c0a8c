"""Comparison with the official COCO tools and with published scores, on real captions."""

import csv
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from imgcap_jax.metrics.coco_format import read_captions, read_references
from imgcap_jax.metrics.official import official_folder
from imgcap_jax.metrics.scoring import CaptionScorer, Scores
from imgcap_jax.text import PUNCTUATION, tokenize

COLUMNS = {
    "Bleu_1": "BLEU-1",
    "Bleu_2": "BLEU-2",
    "Bleu_3": "BLEU-3",
    "Bleu_4": "BLEU-4",
    "ROUGE_L": "ROUGE-L",
    "CIDEr": "CIDEr-D",
    "METEOR": "METEOR",
}


@pytest.fixture(scope="module")
def flickr30k(shared: Path) -> Path:
    return shared / "metrics" / "flickr30k"


@pytest.fixture(scope="module")
def scorer(flickr30k: Path) -> CaptionScorer:
    return CaptionScorer(read_references(flickr30k / "references.json"))


@pytest.fixture(scope="module")
def published(flickr30k: Path) -> dict[str, dict[str, float]]:
    with (flickr30k / "published_scores.csv").open() as file:
        return {row.pop("system"): {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)}


def score(scorer: CaptionScorer, flickr30k: Path, system: str) -> Scores:
    return scorer.score(captions_of(flickr30k, system))


def captions_of(flickr30k: Path, system: str) -> dict[int, str]:
    return {image: found for image, [found] in read_captions(flickr30k / f"{system}.json").items()}


def test_published_scores(flickr30k: Path, scorer: CaptionScorer, published: dict[str, dict[str, float]]) -> None:
    """All twelve systems. The published CIDEr differs by 4e-5 from that of the official tools on these files."""
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed (extra: meteor)")
    largest = dict.fromkeys(COLUMNS.values(), 0.0)
    # The published scores of human_1 are of slightly different captions.
    systems = [system for system in published if system != "human_1"]
    assert len(systems) == 12
    for system in systems:
        values = score(scorer, flickr30k, system).values
        for column, metric in COLUMNS.items():
            tolerance = 1e-4 if metric == "CIDEr-D" else 1e-10
            difference = abs(values[metric] - published[system][column])
            largest[metric] = max(largest[metric], difference)
            assert difference <= tolerance, (system, metric)
    print("largest differences:", largest)


Corpus = tuple[dict[int, list[str]], dict[int, str]]


@pytest.fixture(scope="module")
def corpora(shared: Path, flickr30k: Path) -> dict[str, Corpus]:
    """References and candidates: captions of systems, and raw captions by people.

    In "people", the first caption of each image is the candidate and the others are the references.
    """
    references = read_references(flickr30k / "references.json")
    found = {system: (references, captions_of(flickr30k, system)) for system in ("human_1", "merge_1", "pre_2")}
    karpathy = json.loads((shared / "flickr8k" / "dataset_flickr8k.json").read_text())
    texts = {i: [s["raw"] for s in image["sentences"]] for i, image in enumerate(karpathy["images"][:4500])}
    texts |= {
        10_000 + image: captions
        for image, captions in read_references(shared / "coco_subset" / "annotations" / "captions_train.json").items()
        if len(captions) > 4
    }
    assert len(texts) > 5000
    people = {image: captions[1:] for image, captions in texts.items()}
    return {**found, "people": (people, {image: captions[0] for image, captions in texts.items()})}


@pytest.mark.parametrize("name", ["human_1", "merge_1", "pre_2", "people"])
def test_scores_equal_pycocoevalcap(corpora: dict[str, Corpus], name: str) -> None:
    """The scores of the corpus and of each image, on the same tokens. Needs no Java."""
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed (extra: java)")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references, candidates = corpora[name]
    ids = list(references)
    gts = {i: [" ".join(tokenize(text)) for text in references[i]] for i in ids}
    res = {i: [" ".join(tokenize(candidates[i]))] for i in ids}
    bleu, bleu_images = Bleu(4).compute_score(gts, res, verbose=0)
    cider, cider_images = Cider().compute_score(gts, res)
    rouge, rouge_images = Rouge().compute_score(gts, res)

    ours = CaptionScorer(references).score(candidates)
    theirs = {f"BLEU-{n + 1}": (bleu[n], bleu_images[n]) for n in range(4)}
    theirs |= {"CIDEr-D": (cider, cider_images), "ROUGE-L": (rouge, rouge_images)}
    for metric, (corpus, images) in theirs.items():
        assert ours.values[metric] == pytest.approx(corpus, abs=1e-9), metric
        assert list(ours.per_image[metric].values()) == pytest.approx(list(images), abs=1e-9), metric


@pytest.mark.parametrize("name", ["human_1", pytest.param("people", marks=pytest.mark.slow)])
def test_meteor_equals_the_jar(corpora: dict[str, Corpus], name: str) -> None:
    references, candidates = corpora[name]
    corpus, images = jar_meteor([(candidates[i], references[i]) for i in references])
    scores = CaptionScorer(references).score(candidates)
    differences = np.abs(np.array(list(scores.per_image["METEOR"].values())) - images)
    print(f"{(differences > 1e-4).sum()} of {len(images)} captions differ, the largest by {differences.max():.1e}")
    assert differences.max() < 1e-9
    assert scores.values["METEOR"] == pytest.approx(corpus, abs=1e-9)


def jar_meteor(pairs: list[tuple[str, list[str]]]) -> tuple[float, np.ndarray]:
    """METEOR of the corpus and of each caption, computed by the official jar."""
    official("meteor", "meteor-1.5.jar")
    from pycocoevalcap.meteor.meteor import Meteor

    candidates = {i: [" ".join(tokenize(candidate))] for i, (candidate, _) in enumerate(pairs)}
    references = {i: [" ".join(tokenize(text)) for text in texts] for i, (_, texts) in enumerate(pairs)}
    corpus, images = Meteor().compute_score(references, candidates)
    return corpus, np.array(images)


def official(folder: str, jar: str) -> Path:
    """The path of a jar of pycocoevalcap. Skips the test if Java or the package is missing."""
    if shutil.which("java") is None:
        pytest.skip("no java on this machine")
    place = official_folder(folder)
    if place is None:
        pytest.skip("pycocoevalcap is not installed (extra: java)")
    return place / jar


def raw_captions(shared: Path) -> Iterator[str]:
    karpathy = json.loads((shared / "flickr8k" / "dataset_flickr8k.json").read_text())
    yield from (sentence["raw"] for image in karpathy["images"] for sentence in image["sentences"])
    for split in ("train", "val"):
        document = json.loads((shared / "coco_subset" / "annotations" / f"captions_{split}.json").read_text())
        yield from (annotation["caption"] for annotation in document["annotations"])
    for texts in read_references(shared / "metrics" / "flickr30k" / "references.json").values():
        yield from texts


def jar_tokens(captions: list[str], folder: Path) -> list[list[str]]:
    """The tokens of Stanford's jar, called and filtered as in pycocoevalcap."""
    jar = official("tokenizer", "stanford-corenlp-3.4.1.jar")
    text = folder / "captions.txt"
    text.write_text("\n".join(caption.replace("\n", " ") for caption in captions), encoding="utf-8")
    options = ["-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", str(jar)]
    command = [
        "java",
        *options,
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
        str(text),
    ]
    lines = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\n")
    assert len(lines) >= len(captions)
    # Blanks within a token are no-break spaces, at which BLEU and CIDEr split.
    return [
        [part for word in line.split(" ") if word not in PUNCTUATION for part in word.split()]
        for line in lines[: len(captions)]
    ]


def test_tokens_of_real_captions_equal_the_jar(shared: Path, tmp_path: Path) -> None:
    captions = list(raw_captions(shared))
    assert len(captions) > 50_000
    pairs = zip(captions, jar_tokens(captions, tmp_path), strict=True)
    different = [(caption, tokens) for caption, tokens in pairs if tokenize(caption) != tokens]
    print(f"{len(different)} of {len(captions)} captions differ: {different}")
    assert len(different) <= 1e-4 * len(captions), different[:20]


ODD = """
man's don't cannot gonna well-known Mr. U.S. a.m. 1,000 3.5 1/2 $5 #1 ... .. . , '' ' ` `` " ’ “ ”
Inc. etc. No.
http://foo.com/a www.foo.com a@b.com 😀 ❤ é café &amp; — - -- ½ ( ) [ ] -LRB- <b> </b> 10 5 fig. K. I'm it’s
o'clock O'Neil ma'am y'all '90s 'n' 555-1234 (555) +1 100% 50¢ €5 AT&T R&B and/or a/b t-shirt jr. ! ?
!! ?! ; : :) ;-) * _ a_b / \\ = + c++ @foo #foo 日本語 10:30 6' 5'10" -5 .5 foo.jpg foo woman
A The SHE'S ain't 'tis 1950s 4x4
"""


def test_tokens_of_odd_text_equal_the_jar(tmp_path: Path) -> None:
    rng = random.Random(0)
    odd, texts = ODD.split(), []
    for _ in range(5000):
        pieces = [rng.choice(odd) + rng.choice(["", " ", " ", " "]) for _ in range(rng.randint(2, 9))]
        texts += ["".join(pieces).strip(), "x"]  # the jar's rules look past line ends, so "x" separates the texts
    pairs = list(zip(texts, jar_tokens(texts, tmp_path), strict=True))[::2]
    different = [(text, tokens, tokenize(text)) for text, tokens in pairs if tokenize(text) != tokens]
    print(f"{len(different)} of {len(pairs)} texts differ: {different}")
    assert len(different) <= 2e-3 * len(pairs), different[:20]


def odd_texts(count: int, seed: int) -> list[str]:
    rng, odd = random.Random(seed), ODD.split()
    texts = [
        "".join(rng.choice(odd) + rng.choice(["", " ", " "]) for _ in range(rng.randint(1, 9))) for _ in range(count)
    ]
    return [text.replace("|", " ") for text in texts]  # "|" separates fields in the jar's protocol


@pytest.mark.slow
def test_meteor_of_odd_text_equals_the_jar() -> None:
    """Unicode, emoji, quotes, addresses, empty captions, a thousand words."""
    others = odd_texts(1500, seed=2)
    pairs = [(text, [other, f"{text} {other}"]) for text, other in zip(odd_texts(1500, seed=1), others, strict=True)]
    odd = ["", " ", "...", "\u200b", "dog " * 1000, "a man and a dog " * 200, "\u0301", "x\ty", "“dog” — ‘cat’…"]
    pairs += [(text, ["a man and his dog", "the dogs"]) for text in odd]
    pairs += [("the dog is in front of a man", [text, "zebra"]) for text in odd]
    corpus, images = jar_meteor(pairs)
    scores = CaptionScorer({i: references for i, (_, references) in enumerate(pairs)}).score(
        {i: candidate for i, (candidate, _) in enumerate(pairs)}
    )
    differences = np.abs(np.array(list(scores.per_image["METEOR"].values())) - images)
    print([(pairs[place], images[place]) for place in np.flatnonzero(differences > 1e-9)])
    assert differences.max() < 1e-9
    assert scores.values["METEOR"] == pytest.approx(corpus, abs=1e-9)
