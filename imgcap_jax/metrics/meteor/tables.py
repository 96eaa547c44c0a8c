"""METEOR's English tables: stems, synonyms, function words, paraphrases.

They are the data of the official tool, read from the installed package `pycocoevalcap` (extra `meteor`), compiled once
into arrays in the cache folder and mapped into memory from then on. Nothing in the package is run.

Letters: K known words, D synsets' entries, P nodes of the prefix tree of phrases, E paraphrases.
"""

import gzip
import json
import re
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np

from imgcap_jax.errors import UserError
from imgcap_jax.files import cache_folder
from imgcap_jax.metrics.corpus import pairs
from imgcap_jax.metrics.official import official_folder

HOW_TO_ADD = 'pip install "imgcap_jax[meteor]" (or: pip install pycocoevalcap) adds its tables'
LONGEST = 7  # words of the longest phrase in the table
_FORMAT = 2  # of the compiled tables; to be raised when it changes
_WHOLE = "sizes.json"  # in a folder of compiled tables: the bytes of each file

# Endings that WordNet's morphology takes off a word, tried in this order until a word of the dictionary is left.
_ENDINGS = (
    ("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""),
    ("er", ""), ("er", "e"), ("est", ""), ("est", "e"), ("men", "man"),
)  # fmt: skip


def package_folder() -> Path | None:
    """Where `pycocoevalcap` keeps METEOR's data; None where it is not installed or has none."""
    folder = official_folder("meteor")
    return folder if folder is not None and all(path.is_file() for path in _sources(folder)) else None


def _sources(folder: Path) -> tuple[Path, Path]:
    return folder / "meteor-1.5.jar", folder / "data" / "paraphrase-en.gz"


@dataclass(frozen=True)
class Tables:
    """The compiled tables.

    Attributes:
        number: of each known word.
        stems: the stem of each known word.
        function: which known words are function words, [K].
        synset_start [K+1], synset [D]: entries of a word in the dictionary, without its other forms.
        base_start [K+1], base: the words of which a word is an irregular form.
        prefix: for each phrase length from 2 on, sorted pairs (node of all words but the last, last word). A word's
            node is its number; the nodes of length n follow those of length n-1, in the order of the pairs.
        paraphrase_start [P+1], paraphrase [E]: nodes of the phrases that mean the same as that of a node, in the
            table's order. The table goes one way; matching goes both.
    """

    number: dict[str, int]
    stems: list[str]
    function: np.ndarray
    synset_start: np.ndarray
    synset: np.ndarray
    base_start: np.ndarray
    base: np.ndarray
    prefix: tuple[np.ndarray, ...]
    paraphrase_start: np.ndarray
    paraphrase: np.ndarray

    @classmethod
    def load(cls) -> "Tables":
        """Maps the compiled tables into memory, after compiling them where that was not done yet (10 s, 900 MB).

        Raises:
            UserError: `pycocoevalcap` is not installed or damaged, the cache can't be written.
        """
        package = package_folder()
        if package is None:
            raise UserError(f"METEOR needs its tables: {HOW_TO_ADD}")
        sizes = "-".join(str(path.stat().st_size) for path in _sources(package))
        folder = cache_folder("meteor") / f"1.5-en-{sizes}-{_FORMAT}"
        try:
            if not _is_whole(folder):
                _compile(package, folder)
        except OSError as error:
            raise UserError(
                f"can't keep METEOR's tables in {folder.parent} ({error.strerror or error}): set IMGCAP_CACHE to a "
                "folder that can be written and has 100 MB of room"
            ) from error
        words, stems = ((folder / f"{name}.txt").read_text("utf-8").split("\n") for name in ("words", "stems"))
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in ("function", "synset_start", "synset", "base_start", "base", "paraphrase_start", "paraphrase")
        }
        prefix = tuple(np.load(folder / f"prefix_{n}.npy", mmap_mode="r") for n in range(2, LONGEST + 1))
        return cls({word: i for i, word in enumerate(words)}, stems, prefix=prefix, **arrays)

    def stem(self, word: str) -> str:
        """Snowball's English stem ("Porter 2")."""
        known = self.number.get(word)
        return _stem(word) if known is None else self.stems[known]

    def synsets(self, word: str) -> set[int]:
        """Synsets of a word and of the words of which it may be a form, as WordNet's morphology finds them."""
        known = self.number.get(word)
        numbers = [] if known is None else [known]
        bases = [] if known is None else self.base[self.base_start[known] : self.base_start[known + 1]].tolist()
        if bases:
            numbers += bases
        elif len(word) > 2 and not word.endswith("ss"):
            numbers += islice(self._regular_bases(word), 1)
        return {
            synset
            for number in numbers
            for synset in self.synset[self.synset_start[number] : self.synset_start[number + 1]].tolist()
        }

    def _regular_bases(self, word: str) -> Iterator[int]:
        for ending, replacement in _ENDINGS:
            if word.endswith(ending):
                base = self.number.get(word[: -len(ending)] + replacement)
                if base is not None and self.synset_start[base] < self.synset_start[base + 1]:
                    yield base

    def nodes(self, words: np.ndarray, left: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Looks up all phrases of a text, a length after the other.

        Args:
            words: numbers of the text's words, -1 where a word is not known.
            left: how many words are left in the sentence from each word on, itself included.

        Yields:
            For lengths 1 to `LONGEST`: places where a known phrase, or the beginning of one, starts; its nodes.
        """
        place = np.flatnonzero(words >= 0)
        node = words[place].astype(np.int64)
        yield place, node
        offset = len(self.function)
        for length, keys in enumerate(self.prefix, 2):
            if not len(keys):
                return
            goes_on = left[place] >= length
            place, node = place[goes_on], node[goes_on]
            last = words[place + length - 1].astype(np.int64)
            wanted = pairs(node, last)
            found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            known = (last >= 0) & (keys[found] == wanted)
            place, node = place[known], found[known] + offset
            offset += len(keys)
            yield place, node


@cache
def _snowball() -> Callable[[str], str]:
    from nltk.stem.snowball import EnglishStemmer  # loads much, and most words' stems are in the tables

    stem: Callable[[str], str] = EnglishStemmer().stem
    return stem


def _stem(word: str) -> str:
    stem = _snowball()(word)
    # After one of these suffixes nltk keeps the e of -ize and -ate, which Snowball's last step takes off.
    if re.search("(?:ization|izer|ational)", word) and stem.endswith(("ize", "ate")):
        return stem[:-1]
    return stem


def _is_whole(folder: Path) -> bool:
    """Whether all files are there in the size they were written in; a power cut or a cleaner may have taken some."""
    try:
        sizes = json.loads((folder / _WHOLE).read_text("utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _compile(package: Path, folder: Path) -> None:
    """Compiles the tables into a folder that appears when it is whole, in the place of a damaged one."""
    print("METEOR: compiling its tables, once (10 s)", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".1.5-en-*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    temporary.chmod(0o755)  # a cache may be shared
    try:
        try:
            _write_tables(*_sources(package), temporary)
        except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, KeyError, ValueError) as error:
            raise UserError(f"{package} is damaged ({error}): install pycocoevalcap again") from error
        sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
        (temporary / _WHOLE).write_text(json.dumps(sizes), "utf-8")
        if folder.is_dir() and not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not _is_whole(folder):  # else another process was quicker
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tables(jar: Path, paraphrases: Path, folder: Path) -> None:
    with zipfile.ZipFile(jar) as archive:

        def lines(name: str) -> list[str]:
            return archive.read(name).decode("utf-8").split("\n")

        function = lines("function/english.words")
        synsets = dict(_pairs(lines("synonym/english.synsets")))
        bases: dict[str, list[str]] = {}
        for base, forms in _pairs(lines("synonym/english.exceptions")):
            for form in forms:
                bases.setdefault(form, []).append(base)
    phrases, source, target = _read_paraphrases(paraphrases)
    in_phrases = {word for phrase in phrases for word in phrase.split(" ")}
    irregular = {word for form, words in bases.items() for word in (form, *words)}
    # Entries of several words ("ice_cream") are out of reach, for METEOR matches word by word.
    words = sorted(word for word in {*filter(None, function), *synsets, *irregular, *in_phrases} if "_" not in word)
    number = {word: i for i, word in enumerate(words)}
    (folder / "words.txt").write_text("\n".join(words), "utf-8")
    (folder / "stems.txt").write_text("\n".join(map(_stem, words)), "utf-8")

    known_bases = [[number[base] for base in bases.get(word, ()) if base in number] for word in words]
    arrays = {
        "function": np.isin(words, function),
        **_listed("synset", [[int(synset) for synset in synsets.get(word, ())] for word in words]),
        **_listed("base", known_bases),
    }
    prefix, node_of = _prefix_tree(phrases, number)
    arrays |= {f"prefix_{length}": keys for length, keys in enumerate(prefix, 2)}
    nodes = len(words) + sum(map(len, prefix))
    sources, targets = node_of[np.frombuffer(source, np.int32)], node_of[np.frombuffer(target, np.int32)]
    order = np.argsort(sources, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(sources, minlength=nodes))])
    arrays |= {"paraphrase_start": starts.astype(np.int32), "paraphrase": targets[order].astype(np.int32)}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)


def _pairs(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """A word in one line and what belongs to it in the next."""
    for word, values in zip(lines[::2], lines[1::2], strict=False):
        yield word, values.split()


def _listed(name: str, lists: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Lists of numbers as one array and where each begins."""
    starts = np.concatenate([[0], np.cumsum([len(numbers) for numbers in lists])])
    values = np.array([number for numbers in lists for number in numbers], np.int32)
    return {f"{name}_start": starts.astype(np.int32), name: values}


def _read_paraphrases(path: Path) -> tuple[list[str], array, array]:
    """All phrases, and the numbers of the two phrases of each pair, in the table's order."""
    number: dict[str, int] = {}
    source, target = array("i"), array("i")
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        stripped = (line.rstrip("\n") for line in lines)
        for _probability, one, other in zip(stripped, stripped, stripped, strict=True):
            source.append(number.setdefault(one, len(number)))
            target.append(number.setdefault(other, len(number)))
    return list(number), source, target


def _prefix_tree(phrases: Sequence[str], number: dict[str, int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Sorted pairs of each length from 2 on, and the node of each phrase."""
    flat = array("i", (number[word] for phrase in phrases for word in phrase.split(" ")))
    words = np.frombuffer(flat, np.int32).astype(np.int64)
    lengths = np.fromiter((phrase.count(" ") + 1 for phrase in phrases), np.int64, len(phrases))
    begin = np.cumsum(lengths) - lengths
    node, node_of, offset, prefix = words[begin], np.zeros(len(phrases), np.int64), len(number), []
    alive = np.arange(len(phrases))
    for length in range(1, LONGEST + 1):
        if length > 1:
            longer = lengths[alive] >= length
            alive, node = alive[longer], node[longer]
            keys, node = np.unique(pairs(node, words[begin[alive] + length - 1]), return_inverse=True)
            node = node + offset
            offset += len(keys)
            prefix.append(keys)
        ends = lengths[alive] == length
        node_of[alive[ends]] = node[ends]
    return prefix, node_of
