"""METEOR's English tables: stems, synonyms, function words, paraphrases.

The data are those of the official tool, read from the installed package `pycocoevalcap` (extra `meteor`). They are
compiled once into arrays in the cache folder, which are then mapped into memory. No code of the package is run.

Letters: K known words, D entries of synsets, P nodes of the prefix tree of phrases, E paraphrases.
"""

import gzip
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
from imgcap_jax.files import cache_folder, damages, read_digests, write_digests
from imgcap_jax.metrics.corpus import pairs
from imgcap_jax.metrics.official import official_folder

HOW_TO_ADD = "pip install pycocoevalcap adds its tables"
LONGEST = 7  # words of the longest phrase in the table
_FORMAT = 3  # version of the compiled tables; must be increased when their format changes
_ARRAYS = ("function", "synset_start", "synset", "base_start", "base", "paraphrase_start", "paraphrase")
_PREFIXES = tuple(f"prefix_{length}" for length in range(2, LONGEST + 1))
_TEXTS = ("words", "stems")
_FILES = {*(f"{name}.npy" for name in _ARRAYS + _PREFIXES), *(f"{name}.txt" for name in _TEXTS)}

# Endings that WordNet's morphology replaces, in this order, until the result is a word in the dictionary.
_ENDINGS = (
    ("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""),
    ("er", ""), ("er", "e"), ("est", ""), ("est", "e"), ("men", "man"),
)  # fmt: skip


def package_folder() -> Path | None:
    """The folder of METEOR's data in `pycocoevalcap`; None if it is not installed or does not contain them."""
    folder = official_folder("meteor")
    return folder if folder is not None and all(path.is_file() for path in _sources(folder)) else None


def _sources(folder: Path) -> tuple[Path, Path]:
    return folder / "meteor-1.5.jar", folder / "data" / "paraphrase-en.gz"


@dataclass(frozen=True)
class Tables:
    """The compiled tables.

    Attributes:
        number: the id of each known word.
        stems: the stem of each known word.
        function: whether each known word is a function word, [K].
        synset_start [K+1], synset [D]: the synsets of each word, from `synset_start[word]` on, without those of its
            base forms.
        base_start [K+1], base: the words of which each word is an irregular form.
        prefix: for each phrase length from 2 on, sorted pairs (node of all words except the last, last word). The node
            of a single word is its id. The nodes of length n follow those of length n-1, in the order of the pairs.
        paraphrase_start [P+1], paraphrase [E]: the nodes of the paraphrases of each node, in the order of the table.
            The table lists one direction; matching uses both.
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
        """Maps the compiled tables into memory. Compiles them first if necessary (10 s, 900 MB of memory).

        Raises:
            UserError: `pycocoevalcap` is not installed or is damaged, or the cache cannot be written.
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
                f"cannot write METEOR's tables to {folder.parent} ({error.strerror or error}): set IMGCAP_CACHE to a "
                "writable folder with 100 MB of free space"
            ) from error
        words, stems = ((folder / f"{name}.txt").read_text("utf-8").split("\n") for name in _TEXTS)
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        prefix = tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _PREFIXES)
        return cls({word: i for i, word in enumerate(words)}, stems, prefix=prefix, **arrays)

    def stem(self, word: str) -> str:
        """The stem of a word, by Snowball's English stemmer ("Porter 2")."""
        known = self.number.get(word)
        return _stem(word) if known is None else self.stems[known]

    def synsets(self, word: str) -> set[int]:
        """The synsets of a word and of its possible base forms, which are found as in WordNet's morphology."""
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
        """Looks up all phrases in a text, one phrase length after another.

        Args:
            words: the ids of the words of the text, -1 for unknown words.
            left: the number of words from each word to the end of its sentence, itself included.

        Yields:
            For lengths 1 to `LONGEST`: the positions at which a known phrase or a prefix of one begins; its nodes.
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
    from nltk.stem.snowball import EnglishStemmer  # slow to import, and rarely needed: the tables contain most stems

    stem: Callable[[str], str] = EnglishStemmer().stem
    return stem


def _stem(word: str) -> str:
    stem = _snowball()(word)
    # With these suffixes nltk keeps the e of -ize and -ate, which the last step of Snowball removes.
    if re.search("(?:ization|izer|ational)", word) and stem.endswith(("ize", "ate")):
        return stem[:-1]
    return stem


def _is_whole(folder: Path) -> bool:
    """Whether all files are as they were written (0.1 s). A power cut or a clean-up can damage a cache."""
    try:
        return (read_digests(folder) or {}).keys() == _FILES and not damages(folder)
    except OSError:
        return False


def _compile(package: Path, folder: Path) -> None:
    """Compiles the tables into a temporary folder, which then takes the final name and replaces a damaged folder."""
    print("METEOR: compiling its tables (only once, 10 s)", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".1.5-en-*"):  # left by a process that was killed
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    temporary.chmod(0o755)  # the cache can be shared between users
    try:
        try:
            _write_tables(*_sources(package), temporary)
        except (
            zipfile.BadZipFile,
            gzip.BadGzipFile,
            zlib.error,
            EOFError,
            KeyError,
            ValueError,
            RuntimeError,
        ) as error:
            raise UserError(f"{package} is damaged ({error}): install pycocoevalcap again") from error
        write_digests(temporary)
        if folder.is_dir() and not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not _is_whole(folder):  # otherwise another process has just created it
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
    # Entries of several words ("ice_cream") are omitted, because METEOR matches synonyms word by word.
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
    """Pairs of lines: a word, then the list of its values."""
    for word, values in zip(lines[::2], lines[1::2], strict=False):
        yield word, values.split()


def _listed(name: str, lists: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Concatenates lists of numbers. Returns one array and the start of each list in it."""
    starts = np.concatenate([[0], np.cumsum([len(numbers) for numbers in lists])])
    values = np.array([number for numbers in lists for number in numbers], np.int32)
    return {f"{name}_start": starts.astype(np.int32), name: values}


def _read_paraphrases(path: Path) -> tuple[list[str], array, array]:
    """All phrases, and the indices of the two phrases of each pair, in the order of the table."""
    number: dict[str, int] = {}
    source, target = array("i"), array("i")
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        stripped = (line.rstrip("\n") for line in lines)
        for _probability, one, other in zip(stripped, stripped, stripped, strict=True):
            source.append(number.setdefault(one, len(number)))
            target.append(number.setdefault(other, len(number)))
    return list(number), source, target


def _prefix_tree(phrases: Sequence[str], number: dict[str, int]) -> tuple[list[np.ndarray], np.ndarray]:
    """The sorted pairs (``Tables.prefix``) of each length from 2 on, and the node of each phrase."""
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
