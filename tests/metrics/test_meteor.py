"""METEOR: values by hand, a comparison with a plain version of the search, and missing or damaged tables.

The comparison with the official Java tool is in tests/real/test_official_scores.py.
"""

import gzip
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcap_jax.errors import UserError
from imgcap_jax.metrics import scoring
from imgcap_jax.metrics.corpus import unpair
from imgcap_jax.metrics.meteor import metric, paraphrases, tables
from imgcap_jax.metrics.meteor.alignment import BEAM, align
from imgcap_jax.metrics.meteor.matching import EXACT, PARAPHRASE, STEM, SYNONYM, Matches, Sentences, Words, find_matches
from imgcap_jax.metrics.meteor.normalize import normalize
from imgcap_jax.metrics.meteor.paraphrases import Paraphrases
from imgcap_jax.metrics.meteor.stemmer import stem
from imgcap_jax.metrics.meteor.tables import Tables
from imgcap_jax.metrics.scoring import CaptionScorer

SYNSETS = "dog\n1 2\nhound\n1\ngrind\n3\ncrush\n3\nbe\n4\nexist\n4\nice_cream\n5\nman\n6\nguy\n6\nbox\n7\ncase\n7\n"
EXCEPTIONS = "grind\nground\nbe\nis am\n"
PARAPHRASES = ["a dog|the hound", "hound|big animal", "big animal|hound", "in front of the|before a", "a|the", "x|y y"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with small tables."""
    folder = tmp_path_factory.mktemp("package") / "meteor"
    (folder / "data").mkdir(parents=True)
    with zipfile.ZipFile(folder / "meteor-1.5.jar", "w") as jar:
        jar.writestr("function/english.words", "the\na\nis\n")
        jar.writestr("synonym/english.synsets", SYNSETS)
        jar.writestr("synonym/english.exceptions", EXCEPTIONS)
    with gzip.open(folder / "data" / "paraphrase-en.gz", "wt") as file:
        for pair in PARAPHRASES:
            file.write("0.5\n" + pair.replace("|", "\n") + "\n")
    return folder


@pytest.fixture
def small_tables(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tables:
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "package_folder", lambda: small)
    return Tables.load()


@pytest.fixture(scope="module")
def real_tables() -> Tables:
    if tables.package_folder() is None:
        pytest.skip("METEOR's tables are not installed (extra: meteor)")
    return Tables.load()


def sentences(texts: list[list[str]], words: Words, image: list[int] | None = None) -> Sentences:
    lengths = np.array([len(text) for text in texts])
    return Sentences(words.numbers(texts), lengths, np.arange(len(texts)) if image is None else np.array(image))


def rows(matches: Matches, pair: int) -> list[tuple[int, ...]]:
    """The matches of a pair as tuples (module, start, length, other start, other length)."""
    columns = (matches.module, matches.start, matches.length, matches.other_start, matches.other_length)
    return [tuple(int(column[row]) for column in columns) for row in np.flatnonzero(matches.pair == pair)]


def test_tables_are_compiled_once(small_tables: Tables, tmp_path: Path) -> None:
    folder = next((tmp_path / "meteor").iterdir())
    assert [path.name for path in (tmp_path / "meteor").iterdir()] == [folder.name]  # no temporary folder is left
    before = (folder / "paraphrase.npy").stat().st_mtime_ns
    assert Tables.load().number == small_tables.number
    assert (folder / "paraphrase.npy").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty", "flipped", "no digests"])
def test_damaged_tables_are_compiled_again(damage: str, small_tables: Tables, tmp_path: Path) -> None:
    folder = next((tmp_path / "meteor").iterdir())
    words, before = (folder / "words.txt").read_text(), small_tables.paraphrase.copy()
    if damage == "truncated":
        (folder / "words.txt").write_text(words[:20])
    elif damage == "missing":
        (folder / "synset.npy").unlink()
    elif damage == "flipped":
        content = bytearray((folder / "paraphrase.npy").read_bytes())
        content[-2] ^= 1
        (folder / "paraphrase.npy").write_bytes(content)
    elif damage == "no digests":
        (folder / "SHA256SUMS").write_text("")
    else:
        for path in folder.iterdir():
            path.unlink()
    assert Tables.load().number == small_tables.number
    assert (folder / "words.txt").read_text() == words
    np.testing.assert_array_equal(Tables.load().paraphrase, before)


def test_compilation_errors_say_what_to_do(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "package_folder", lambda: small)
    (tmp_path / "file").touch()
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set IMGCAP_CACHE"):
        Tables.load()
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path))
    broken = tmp_path / "broken"
    (broken / "data").mkdir(parents=True)
    (broken / "meteor-1.5.jar").write_text("version https://git-lfs.github.com/spec/v1")
    (broken / "data" / "paraphrase-en.gz").touch()
    monkeypatch.setattr(tables, "package_folder", lambda: broken)
    with pytest.raises(UserError, match=r"is damaged .* install pycocoevalcap again"):
        Tables.load()


def test_a_failed_compilation_leaves_no_files(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "package_folder", lambda: small)
    with monkeypatch.context() as broken:
        broken.setattr(tables, "_prefix_tree", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Tables.load()
    assert not list((tmp_path / "meteor").iterdir())
    Tables.load()


def test_a_table_that_another_process_has_just_compiled_is_used(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "package_folder", lambda: small)
    write, files = tables._write_tables, list[int]()

    def write_after_another(*arguments: Path) -> None:
        monkeypatch.setattr(tables, "_write_tables", write)
        Tables.load()
        files.extend(path.stat().st_ino for path in sorted((tmp_path / "meteor").glob("[!.]*/*")))
        write(*arguments)

    monkeypatch.setattr(tables, "_write_tables", write_after_another)
    assert "hound" in Tables.load().number
    assert files == [path.stat().st_ino for path in sorted((tmp_path / "meteor").glob("*/*"))]


def test_tables_of_earlier_formats_are_deleted(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "package_folder", lambda: small)
    others = {"1.5-en-1-2-999", "1.5-en-notes-1", "notes-1"}
    for name in {"1.5-en-1-2-1", f"1.5-en-1-2-{tables._FORMAT - 1}", *others}:
        (tmp_path / "meteor" / name).mkdir(parents=True)
        (tmp_path / "meteor" / name / "words.txt").touch()
    Tables.load()
    found = {path.name for path in (tmp_path / "meteor").iterdir()}
    assert others < found
    assert [name[-2:] for name in found - others] == [f"-{tables._FORMAT}"]


def test_damaged_tables_are_deleted_under_another_name(
    small_tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process never reads a folder of which some files have been deleted."""
    folder = next((tmp_path / "meteor").iterdir())
    (folder / "words.txt").write_text("")
    delete, deleted = shutil.rmtree, list[str]()

    def only_if_replaced(path: Path, ignore_errors: bool) -> None:
        assert path != folder
        if path.parent == folder.parent and path.exists():
            assert tables._is_whole(folder)
            deleted.append((path / "words.txt").read_text())
        delete(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patched:
        patched.setattr(tables.shutil, "rmtree", only_if_replaced)
        Tables.load()
    assert deleted == [""]
    assert list((tmp_path / "meteor").iterdir()) == [folder]


def test_tables_that_disappear_while_they_are_read_are_read_again(
    small_tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mapped = next((tmp_path / "meteor").iterdir()), tables._mapped

    def moved(path: Path) -> np.ndarray:
        monkeypatch.setattr(tables, "_mapped", mapped)
        folder.rename(tmp_path / "moved")
        return mapped(path)

    monkeypatch.setattr(tables, "_mapped", moved)
    np.testing.assert_array_equal(Tables.load().paraphrase, small_tables.paraphrase)
    assert (tmp_path / "moved").exists()

    def unreadable(path: Path) -> np.ndarray:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tables, "_mapped", unreadable)
    with pytest.raises(UserError, match=r"Permission denied.*: set IMGCAP_CACHE"):
        Tables.load()


def table_of_paraphrases(path: Path, paraphrases: Sequence[tuple[str, str]]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"0.5\n{source}\n{paraphrase}\n" for source, paraphrase in paraphrases)
    return path


@pytest.mark.parametrize("block", [60, 1 << 20])
def test_the_table_of_paraphrases_is_read_in_blocks(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks end within lines. Sources come again later, and words have several bytes per letter."""
    monkeypatch.setattr(paraphrases, "_BLOCK", block)
    rng = random.Random(0)
    words = [f"w{i}" for i in range(300)] + ["caf\u00e9", "\u2026", "a"]  # more than one byte per number
    phrases = [" ".join(rng.choices(words, k=rng.randint(1, 7))) for _ in range(200)]
    expected = [
        (source, rng.choice(phrases)) for source in rng.choices(phrases, k=150) for _ in range(rng.randint(1, 4))
    ]
    found = Paraphrases.read(table_of_paraphrases(tmp_path / "table.gz", expected), 7)
    assert found.words == sorted({word for pair in expected for phrase in pair for word in phrase.split()})
    read = [" ".join(found.words[word - 1] for word in phrase if word) for phrase in found.phrases.tolist()]
    sources = np.repeat(read[-len(found.repeats) :], found.repeats).tolist()
    assert list(zip(sources, read, strict=False)) == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: gzip.compress(gzip.decompress(content)[:-1]), "groups of three lines"),
        (lambda content: gzip.compress(b"0.5\na b c d e f g h\nx\n"), "a phrase of 8 words"),
        (lambda content: gzip.compress(b"0.5\na\n\xff\n"), "decode"),
        (lambda content: content[:-12], "ended before"),
        (lambda content: b"", "is empty"),
    ],
)
def test_a_damaged_table_of_paraphrases_is_reported(
    damage: Callable[[bytes], bytes], message: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    shutil.copytree(small, package)
    table = package / "data" / "paraphrase-en.gz"
    table.write_bytes(damage(table.read_bytes()))
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "package_folder", lambda: package)
    with pytest.raises(UserError, match=f"is damaged .*{message}.*: install pycocoevalcap again"):
        Tables.load()
    assert not list((tmp_path / "cache" / "meteor").iterdir())


@pytest.mark.parametrize("vocabulary", [4, 255, 256, 70_000])
def test_prefix_tree_equals_a_plain_version(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of words at the limits of a byte and above 16 bits, in one part and in many parts."""
    rng = random.Random(vocabulary)
    ids, known = np.arange(vocabulary) * 2 + 1, 2 * vocabulary
    some = [1, 2, 3, vocabulary]
    phrases = [tuple(rng.choices(some, k=rng.randint(1, 7))) for _ in range(400)]
    beginnings = sorted(
        {phrase[:n] for phrase in phrases for n in range(2, len(phrase) + 1)}, key=lambda words: (len(words), words)
    )
    node = {(word,): int(ids[word - 1]) for word in some} | {words: known + i for i, words in enumerate(beginnings)}
    padded = np.zeros((len(phrases), 7), np.min_scalar_type(vocabulary))
    for row, phrase in zip(padded, phrases, strict=True):
        row[: len(phrase)] = phrase
    for at_a_time in (1 << 17, 50):
        monkeypatch.setattr(tables, "_AT_A_TIME", at_a_time)
        prefix, node_of = tables._prefix_tree(padded, ids, known)
        assert node_of.tolist() == [node[phrase] for phrase in phrases]
        for length, keys in enumerate(prefix, 2):
            expected = [(node[words[:-1]], node[words[-1:]]) for words in beginnings if len(words) == length]
            assert list(zip(*(half.tolist() for half in unpair(keys)), strict=True)) == expected


@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)])  # 1: all words
def test_stems_equal_nltk(step: int, real_tables: Tables) -> None:
    from nltk.stem.snowball import EnglishStemmer

    oracle = EnglishStemmer()
    some = list(real_tables.number)[::step]
    for word in [*some, *LEXICON, "", "y", "yy", "say", "eyed", "boy's", "'tis", "gently"]:
        expected = oracle.stem(word)
        # With these suffixes nltk keeps the e of -ize and -ate, which the last step of Snowball removes.
        if re.search("(?:ization|izer|ational)", word) and expected.endswith(("ize", "ate")):
            expected = expected[:-1]
        assert stem(word) == expected, word


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("caresses", "caress"), ("ties", "tie"), ("cries", "cri"), ("gas", "gas"), ("gaps", "gap"), ("buses", "buse"),
        ("agreed", "agre"), ("feed", "feed"), ("hopped", "hop"), ("hoping", "hope"), ("luxuriating", "luxuri"),
        ("troubled", "troubl"), ("happy", "happi"), ("by", "by"), ("say", "say"), ("youth", "youth"),
        ("generously", "generous"), ("communion", "communion"), ("realization", "realiz"), ("organizer", "organ"),
        ("relational", "relat"), ("apology", "apolog"), ("likely", "like"), ("vitally", "vital"),
        ("hopefulness", "hope"), ("triplicate", "triplic"), ("authoritative", "authorit"), ("talkative", "talkat"),
        ("adoption", "adopt"), ("replacement", "replac"), ("rate", "rate"), ("controlling", "control"),
        ("skies", "sky"), ("innings", "inning"), ("proceeding", "proceed"), ("szdtated", "szdtate"),
    ],
)  # fmt: skip
def test_stems(word: str, expected: str) -> None:
    """Each rule. The values are those of the official jar (the last one differs from nltk)."""
    assert stem(word) == expected


def test_scoring_imports_no_large_library(small: Path, tmp_path: Path) -> None:
    """With compiled tables, METEOR imports neither pyarrow, which compiles them, nor JAX nor nltk."""
    program = f"""
import sys
from pathlib import Path
from imgcap_jax.metrics.meteor import tables
from imgcap_jax.metrics.score_files import CaptionScorer
tables.package_folder = lambda: Path({str(small)!r})
if sys.argv[1:]:
    from imgcap_jax.metrics.meteor.metric import prepare
    print(CaptionScorer({{1: ["a dog unknownly"]}}, {{"METEOR": prepare}}).score({{1: "the hound unknowns"}}).values)
else:
    tables.Tables.load()
print(sorted({{"jax", "nltk", "pyarrow", "scipy"}} & set(sys.modules)))
"""
    environment = {**os.environ, "IMGCAP_CACHE": str(tmp_path)}
    lines = [
        subprocess.run(
            [sys.executable, "-c", program, *arguments], env=environment, check=True, capture_output=True, text=True
        ).stdout.splitlines()
        for arguments in ([], ["score"])
    ]
    assert lines[0] == ["['pyarrow']"]
    assert "METEOR" in lines[1][0]
    assert lines[1][1:] == ["[]"]


def test_synsets_of_inflected_words(small_tables: Tables) -> None:
    synsets = small_tables.synsets
    assert synsets("dog") == {1, 2}
    assert synsets("dogs") == {1, 2}  # a regular form
    assert synsets("ground") == {3}  # an irregular form
    assert synsets("is") == {4}
    assert synsets("guys") == synsets("men") == {6}  # the ending -men
    assert synsets("boxes") == {7}
    assert synsets("mans") == {6}
    assert synsets("bes") == {4}
    assert synsets("dogss") == set()  # -s is not removed after s
    assert synsets("zebra") == set()
    assert "ice_cream" not in small_tables.number


def test_phrases_of_all_lengths(small_tables: Tables) -> None:
    """The prefix tree finds the same phrases as a plain search for each of them."""
    text = ["a", "dog", "in", "front", "of", "the", "hound", "before", "a", "big", "animal", "in", "front", "of"]
    words = np.array([small_tables.number.get(word, -1) for word in text])
    left = np.arange(len(text), 0, -1)
    phrases = {phrase for pair in PARAPHRASES for phrase in pair.split("|")}
    prefixes = {tuple(phrase.split()[:n]) for phrase in phrases for n in range(2, 8)}
    for length, (place, node) in enumerate(small_tables.nodes(words, left), 1):
        expected = [i for i in range(len(text) - length + 1) if length == 1 or tuple(text[i : i + length]) in prefixes]
        assert place.tolist() == expected
        # Two spans have the same node if and only if their phrases are equal.
        spans = [tuple(text[i : i + length]) for i in place]
        assert len(set(zip(spans, node.tolist(), strict=True))) == len(set(spans)) == len(set(node.tolist()))


def test_matches_by_hand(small_tables: Tables) -> None:
    words = Words(small_tables)
    ours = sentences([["a", "dog", "is", "barking"], ["hound"], ["in", "front", "of", "the", "x"]], words)
    theirs = sentences([["the", "hound", "was", "barked"], ["big", "animal"], ["before", "a", "y", "y"]], words)
    matches = find_matches(ours, theirs, words)
    assert rows(matches, 0) == [
        (PARAPHRASE, 0, 1, 0, 1),  # the, a: the table lists the opposite direction
        (PARAPHRASE, 0, 2, 0, 2),  # the hound, a dog
        (SYNONYM, 1, 1, 1, 1),  # hound, dog
        (STEM, 3, 1, 3, 1),  # barked, barking
    ]
    assert rows(matches, 1) == [(PARAPHRASE, 0, 2, 0, 1)] * 2  # listed in both directions, so found twice
    assert rows(matches, 2) == [
        (PARAPHRASE, 0, 2, 0, 4),
        (PARAPHRASE, 1, 1, 3, 1),
        (PARAPHRASE, 2, 2, 4, 1),
    ]


def plain_align(found: list[tuple[int, ...]], ours: int, theirs: int, beam: int = BEAM) -> list[tuple[int, ...]]:
    """A plain version of the search that the docstring of alignment.py describes, with one tuple per path."""
    covered = ([0] * ours, [0] * theirs)
    for _, start, length, other, other_length in found:
        for word in range(start, start + length):
            covered[1][word] += 1
        for word in range(other, other + other_length):
            covered[0][word] += 1
    definite = {
        match
        for match in found
        if all(covered[1][word] == 1 for word in range(match[1], match[1] + match[2]))
        and all(covered[0][word] == 1 for word in range(match[3], match[3] + match[4]))
    }

    def rank(path: tuple) -> tuple:
        return (-path[0], path[1], path[2])

    paths: list[Any] = [(0, 0, 0, -1, 0, frozenset(), ())]  # covered, chunks, distance, end, next word, used, taken
    for current in range(theirs + 1):
        paths = sorted(paths, key=rank)[:beam]
        if current == theirs:
            break
        further: list[Any] = []
        for total, chunks, distance, end, position, used, taken in paths:
            if position > current:
                further.append((total, chunks, distance, end, position, used, taken))
                continue
            here = [match for match in found if match[1] == current]
            charged = distance
            for match in here:
                module, start, length, other, other_length = match
                span = set(range(other, other + other_length))
                if used & span:
                    continue
                gain = length + other_length if module == EXACT else length // 2 + other_length // 2
                broken = chunks + (end not in (-1, other))
                own = charged + abs(start - other) * (match in definite)
                further.append(
                    (total + gain, broken, own, other + other_length, current + length, used | span, (*taken, match))
                )
                charged += abs(start - other)
            if not any(match in definite for match in here):
                further.append((total, chunks + (end != -1), charged, -1, current + 1, used, taken))
        paths = further
    paths = [(path[0], path[1] + (path[3] != -1), *path[2:]) for path in paths]
    return list(min(paths, key=rank)[6])


_WORDS = """
a the man men guy dog dogs hound runs running run is are in on of front to street road big large red ball play plays
playing woman girl through grass next sitting sits an with two people
"""
LEXICON = _WORDS.split()


@pytest.mark.parametrize(("count", "longest", "vocabulary"), [(600, 14, 40), (60, 30, 12), (4, 150, 40), (3, 90, 3)])
def test_search_equals_a_plain_version(count: int, longest: int, vocabulary: int, real_tables: Tables) -> None:
    """Short captions; captions with many equal words, which fill the beam; captions of more than 64 words."""
    rng = random.Random(longest)
    lexicon = LEXICON[:vocabulary]

    def sentence() -> list[str]:
        return [rng.choice(lexicon) for _ in range(rng.randint(max(1, longest // 3), longest))]

    ours, theirs = [sentence() for _ in range(count)], [sentence() for _ in range(count)]
    theirs[0] = ours[0]
    words = Words(real_tables)
    candidates, references = sentences(ours, words), sentences(theirs, words)
    matches = find_matches(candidates, references, words)
    taken = matches.take(align(matches, candidates.lengths, references.lengths))
    assert (matches.module == PARAPHRASE).any()
    for pair in range(count):
        assert rows(taken, pair) == plain_align(rows(matches, pair), len(ours[pair]), len(theirs[pair])), pair


def test_scores_do_not_depend_on_the_group_size(real_tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    texts = {i: [" ".join(rng.choices(LEXICON, k=rng.randint(1, 12))) for _ in range(i % 4 + 1)] for i in range(30)}
    candidates = {i: " ".join(rng.choices(LEXICON, k=8)) for i in texts}
    together = CaptionScorer(texts, {"METEOR": metric.prepare}).score(candidates)
    monkeypatch.setattr(metric, "_IMAGES_AT_A_TIME", 7)
    apart = CaptionScorer(texts, {"METEOR": metric.prepare}).score(candidates)
    assert together == apart


def meteor(candidate: str, references: list[str]) -> float:
    return CaptionScorer({1: references}, {"METEOR": metric.prepare}).score({1: candidate}).values["METEOR"]


def test_values_by_hand(real_tables: Tables) -> None:
    assert meteor("a dog runs", ["a dog runs"]) == pytest.approx(1)
    assert meteor("a dog runs", ["a zebra", "a dog runs"]) == pytest.approx(1)
    assert meteor("zebra", ["a dog runs"]) == 0
    assert meteor("", ["a dog runs"]) == 0
    assert meteor(".", ["a dog runs"]) == 0
    assert meteor("zebra", ["."]) == 0
    # "cat dog" and "a dog": the candidate has two content words, the reference a function word and a content word.
    # One content word is matched.
    precision, recall = 0.75 / 1.5, 0.75 / 1.0
    mean = 1 / (0.15 / precision + 0.85 / recall)
    assert meteor("cat dog", ["a dog"]) == pytest.approx(mean * (1 - 0.6 * 1**0.2))
    # The same words in the opposite order: all words are matched, in two chunks.
    assert meteor("dog cat", ["cat dog"]) == pytest.approx(1 - 0.6 * (2 / 2) ** 0.2)
    # An identical word and a stem with the weight 0.6, in one chunk that covers both sentences.
    assert meteor("zebra dogs", ["zebra dog"]) == pytest.approx((1 + 0.6) / 2)
    # The search counts 0 for a match of single words by stem or synset, so that a lone one is not worth its chunk.
    assert meteor("dogs", ["dog"]) == 0


def test_the_corpus_score_is_computed_from_sums(real_tables: Tables) -> None:
    """The sums are 6 and 6 words. The chunk of the image that is matched completely is not counted."""
    scorer = CaptionScorer({1: ["a dog runs fast"], 2: ["a dog"]}, {"METEOR": metric.prepare})
    scores = scorer.score({1: "a dog runs fast", 2: "cat dog"})
    precision, recall = (4 * 0.75 + 0.25) / (5 * 0.75 + 0.25), (4 * 0.75 + 0.25) / (4 * 0.75 + 2 * 0.25)
    mean = 1 / (0.15 / precision + 0.85 / recall)
    assert scores.values["METEOR"] == pytest.approx(mean * (1 - 0.6 * (1 / 5) ** 0.2))


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("a man 's t-shirt", "a man ' s t shirt"),
        ("do n't", "do n 't"),
        ("u.s. army", "us army"),
        ("mr. x", "mr. x"),
        ("x mr.", "x mr ."),
        ("1,000 and 3.5 in 1/2", "1,000 and 3.5 in 1 / 2"),
        ("a-b-c", "a b-c"),
        ("-lrb- x -rrb-", "-lrb- x -rrb-"),
        ("$ 50%", "$ 50 %"),
        ("日本 é", "日 本 é"),
    ],
)
def test_normalisation(tokens: str, words: str) -> None:
    assert normalize(tokens.split()) == words.split()


def test_meteor_is_reported_as_missing_without_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "package_folder", lambda: None)
    scores = CaptionScorer({1: ["a dog"], 2: ["a cat"]}).score({1: "a dog", 2: "a cat"})
    assert "METEOR" not in scores.values
    assert "METEOR" not in scores.signature
    assert scores.missing["METEOR"] == "pip install pycocoevalcap adds its tables"
    monkeypatch.setattr(tables, "package_folder", lambda: None)
    with pytest.raises(UserError, match="METEOR needs its tables: pip install pycocoevalcap"):
        Tables.load()
