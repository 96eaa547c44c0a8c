"""Decoding and scoring a whole split, after every epoch of training and on demand."""

import itertools
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from imgcap_jax.data.pipeline import EvalBatches, eval_batches, images_of_rows
from imgcap_jax.data.scenes.truth import TruthScores, judge
from imgcap_jax.data.scenes.world import Scene
from imgcap_jax.data.sources import CaptionSource, open_source, parse_mixture
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.decoding.mbr import Knowledge
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError, counted
from imgcap_jax.experiment import signature
from imgcap_jax.files import read_json, reading, write_text
from imgcap_jax.metrics.coco_format import write_references, write_results
from imgcap_jax.metrics.degeneration import Degeneration
from imgcap_jax.metrics.scoring import CaptionScorer, CustomMetric, Scores, available_metrics, with_custom
from imgcap_jax.models.model import Frozen, Params
from imgcap_jax.remote import shown
from imgcap_jax.run.folder import Run, check_ensemble
from imgcap_jax.run.generation import caption_function, caption_rows, check_decoding
from imgcap_jax.run.knowledge import knowledge_of
from imgcap_jax.run.members import Example, Member, attend, load_members
from imgcap_jax.run.mirror import push
from imgcap_jax.special_tokens import EOS
from imgcap_jax.terminal import Say, Work, working
from imgcap_jax.tokenizers import tokens_of
from imgcap_jax.training.checkpoints import CHECKPOINTS, latest_step
from imgcap_jax.training.losses import LossSums, caption_loss
from imgcap_jax.training.parallel import DataParallel, is_first_process

BATCH = 64  # images that a device decodes at a time


def batch_size(images: int, devices: int) -> int:
    """The size of the batches in which a split of this number of images is evaluated, over all devices."""
    return -(-min(BATCH * devices, images) // devices) * devices


def evaluated_images(images: int, parallel: DataParallel) -> list[int]:
    """The numbers of the images that this process reads to evaluate a split of this number of images."""
    size = batch_size(images, len(parallel.devices))
    return images_of_rows(images, size, parallel.rows(size))


@dataclass(frozen=True)
class Hypothesis:
    """One of several captions of an image. log_prob: the model's own. score: what the search ranked."""

    caption: str
    log_prob: float
    score: float


@dataclass(frozen=True)
class Captioned:
    """The captions of a split.

    Attributes:
        captions: image id -> the best caption (the first one, if captions were sampled).
        tokens: image id -> its tokens, int32 [T], without bos.
        hypotheses: image id -> the n best captions, best first, or all samples.
        unfinished: share of the best captions that were cut before their end.
        mean_steps: mean number of decoder steps per batch. Of a batch on several devices, which end their searches
            independently, it counts the steps of the device that takes the most.
        max_steps: the number of steps without early exit, T.
        images_per_second: without compilation.
    """

    captions: dict[int, str]
    tokens: dict[int, np.ndarray]
    hypotheses: dict[int, list[Hypothesis]]
    unfinished: float
    mean_steps: float
    max_steps: int
    images_per_second: float


class SplitEvaluator:
    """Captions one split with given parameters, and scores the captions.

    References are tokenised once, so that only the candidates are processed after each epoch.

    Attributes:
        say: receives the lines about the progress; None: they go to the standard error.

    Each process reads and decodes the images of its own devices. The captions are gathered, so that every process has
    all of them and computes the same scores.
    """

    def __init__(
        self,
        members: Sequence[Member],
        source: CaptionSource,
        vocabulary: Vocabulary,
        parallel: DataParallel,
        metrics: Sequence[CustomMetric] = (),
        say: Say | None = None,
        before_batch: Callable[[], None] = lambda: None,
        knowledge: Mapping[Decoding, Knowledge | None] | None = None,
    ) -> None:
        """Prepares the references.

        Args:
            members: the models.
            source: the split.
            vocabulary: the words of the models.
            parallel: the devices.
            metrics: computed in addition to ``available_metrics``.
            say: see ``working``, which shows the progress; if given, compilations are announced.
            before_batch: called before each batch, on all processes; its exceptions end the work.
            knowledge: what each decoding needs of the training data; None: nothing.
        """
        self.source = source
        self.say, self._before_batch = say, before_batch
        self._members, self._vocabulary, self._parallel = members, vocabulary, parallel
        self._knowledge = knowledge or {}
        self._ids = [int(image_id) for image_id in source.image_ids()]
        self.references = {image_id: source.captions(i) for i, image_id in enumerate(self._ids)}
        self.file_names = dict(zip(self._ids, source.filenames(), strict=True))
        tokenizer = vocabulary.tokenizer
        known = with_custom(available_metrics(tokenizer=tokenizer), metrics)
        with self._working("processing the references"):
            self._scorer = CaptionScorer(self.references, known, tokenizer=tokenizer)
        self._functions: dict[Decoding, Any] = {}
        self._size = batch_size(len(source), len(parallel.devices))
        self._rows = parallel.rows(self._size)
        self._images = [
            eval_batches(member.data, source, batch_size=self._size, rows=self._rows, features=member.store)
            for member in members
        ]
        self._with_tokens: EvalBatches | None = None
        self._teacher_forced = parallel.map_rows(self._loss_sums)

    def caption(self, params: Sequence[Params], frozen: Sequence[Frozen], decoding: Decoding) -> Captioned:
        """Decodes the whole split with the parameters of each member."""
        knowledge = self._parallel.replicate(self._knowledge.get(decoding))
        if decoding not in self._functions:
            graphs = [member.graph for member in self._members]
            captions_of = caption_function(graphs, decoding, self._vocabulary)

            def with_knowledge(params: Any, frozen: Any, knowledge: Any, batches: Any) -> Any:
                return captions_of(params, frozen, batches, knowledge)

            function = self._functions[decoding] = self._parallel.map_rows(with_knowledge)
            # Compiled before the time is measured.
            with self._working(f"compiling decoding ({decoding.title})", announced=self.say is not None):
                first = [next(self._on_devices(images))[0] for images in self._images]
                jax.block_until_ready(function(params, frozen, knowledge, first).tokens)
        start = time.perf_counter()
        parts: list[tuple[np.ndarray, ...]] = []
        with self._working("decoding", len(self._ids)) as work:
            for batches in zip(*map(self._on_devices, self._images), strict=True):
                decoded = self._functions[decoding](params, frozen, knowledge, [batch for batch, _ in batches])
                found = self._parallel.own((decoded.tokens, decoded.log_prob, decoded.score, decoded.steps))
                parts.append((batches[0][1] + self._rows, *found))
                work.update(min(batches[0][1] + self._size, len(self._ids)))
        steps = self._parallel.gather(np.stack([part[-1] for part in parts], axis=1))  # [devices,batches]
        joined = [np.concatenate(column) for column in list(zip(*parts, strict=True))[:-1]]
        numbers, tokens, log_probs, scores = self._parallel.gather(joined)
        captions: dict[int, str] = {}
        best: dict[int, np.ndarray] = {}
        hypotheses: dict[int, list[Hypothesis]] = {}
        unfinished = 0
        for row in np.argsort(numbers)[: len(self._ids)]:  # padding has the largest numbers
            image_id = self._ids[numbers[row]]
            hypotheses[image_id] = [
                Hypothesis(self._vocabulary.decode(tokens[row, m]), float(log_probs[row, m]), float(scores[row, m]))
                for m in caption_rows(tokens[row], decoding)
            ]
            captions[image_id] = hypotheses[image_id][0].caption
            best[image_id] = tokens[row, 0]
            unfinished += EOS not in best[image_id]
        rate = len(captions) / (time.perf_counter() - start)
        return Captioned(
            captions,
            best,
            hypotheses,
            unfinished / len(captions),
            float(np.mean(steps.max(axis=0))),
            decoding.max_words,
            rate,
        )

    def score(self, captions: Mapping[int, str]) -> Scores:
        """The scores of one caption per image."""
        with self._working(f"scoring {counted(len(captions), 'caption')}"):
            return self._scorer.score(captions)

    def degeneration(self, captioned: Captioned) -> tuple[Degeneration, tuple[str, ...]]:
        """Defects of the captions that scores do not show, and a warning for each that is more frequent than in the
        references."""
        texts = (tokens_of(text, self._vocabulary.tokenizer) for text in captioned.captions.values())
        found = Degeneration.of(texts, captioned.unfinished)
        return found, found.warnings(self._references_degeneration)

    def degeneration_summary(self, found: Degeneration) -> str:
        """The defects that are more frequent than in the references, in one line; "" if there are none."""
        return found.summary(self._references_degeneration)

    @cached_property
    def _references_degeneration(self) -> Degeneration:
        return Degeneration.of(itertools.chain.from_iterable(self._scorer.references.tokens))

    def score_of_other_photos(self, captions: Mapping[int, str]) -> Scores:
        """The scores if each image gets the caption of another, random image: the floor.

        This is what captions score because of how people describe such photos. Only the rest is due to the image. The
        images form one random ring, so that no image keeps its own caption.
        """
        ring = np.random.default_rng(0).permutation(self._ids).tolist()
        return self.score(dict(zip(ring, (captions[other] for other in ring[1:] + ring[:1]), strict=True)))

    def examples(
        self, params: Sequence[Params], frozen: Sequence[Frozen], captioned: Captioned, count: int
    ) -> tuple[Example, ...]:
        """This number of images, evenly spaced over the split (all, if there are fewer), with their attention."""
        numbers = spread(len(self._ids), count)
        tokens = np.stack([captioned.tokens[self._ids[number]] for number in numbers])
        with self._working("attention of the examples"):
            return attend(self._members, params, frozen, self._images, numbers, tokens, self._vocabulary)

    def teacher_forced(self, params: Params, frozen: Frozen) -> dict[str, float]:
        """Loss and perplexity per word of the first member under teacher forcing.

        This is a diagnostic. Checkpoints are never selected by it.
        """
        if self._with_tokens is None:  # made once, because it encodes all captions
            member = self._members[0]
            with self._working("compiling the teacher-forced loss", announced=self.say is not None):
                self._with_tokens = eval_batches(
                    member.data,
                    self.source,
                    batch_size=self._size,
                    rows=self._rows,
                    features=member.store,
                    vocabulary=self._vocabulary,
                )
                first_batch = next(self._on_devices(self._with_tokens))[0]
                jax.block_until_ready(self._teacher_forced(params, frozen, first_batch))
        parts = []
        with self._working("teacher-forced loss", len(self._ids)) as work:
            for batch, first in self._on_devices(self._with_tokens):
                sums = self._teacher_forced(params, frozen, batch)
                parts.append(np.stack(self._parallel.own((sums.log_likelihood, sums.words))))
                work.update(min(first + self._size, len(self._ids)))
        sums = self._parallel.gather(np.stack(parts)[None])  # [processes,batches,2,devices of each]
        log_likelihood, words = np.cumsum(sums.transpose(1, 0, 3, 2).reshape(-1, 2), axis=0, dtype=np.float64)[-1]
        loss = -float(log_likelihood) / max(float(words), 1.0)
        return {"teacher_forced_loss": loss, "teacher_forced_perplexity": float(np.exp(loss))}

    def _loss_sums(self, params: Params, frozen: Frozen, batch: Mapping[str, Array]) -> LossSums:
        model = nnx.merge(self._members[0].graph, params, frozen)
        hidden = model.teacher_forced(batch).hidden
        return caption_loss(model.score_words, hidden, batch["tokens"], batch["weight"])

    def _working(
        self, title: str, images: int | None = None, *, announced: bool = False
    ) -> AbstractContextManager[Work]:
        """Shows the progress of this process, if it is the one that prints."""
        return working(title, images, "images", shown=is_first_process(), say=self.say, announced=announced)

    def _on_devices(self, batches: EvalBatches) -> Iterator[tuple[dict[str, Array], int]]:
        """Batches on the devices, each with the number of its first image."""
        for number, batch in enumerate(batches):
            self._before_batch()
            del batch["image_id"]  # 64 bits, stays on the host
            batch["row"] = (self._rows + number * self._size).astype(np.int32)
            yield self._parallel.put_rows(batch, self._size), number * self._size


def spread(images: int, count: int) -> list[int]:
    """The numbers of ``count`` images of a split, evenly spaced; of all, if there are fewer."""
    numbers: list[int] = np.linspace(0, images - 1, min(count, images)).astype(int).tolist()
    return numbers


@dataclass(frozen=True)
class Evaluation:
    """The scores of a run or an ensemble on a split.

    warnings: one line each, about scores and defects of captions. truth: only for drawn scenes. floor: see
    ``SplitEvaluator.score_of_other_photos``; None unless requested. runs, steps: the run, or the members of the
    ensemble, and the step of the parameters of each. examples: none unless requested. files: what was written.
    """

    source: CaptionSource
    decoding: Decoding
    scores: Scores
    captioned: Captioned
    degeneration: Degeneration
    warnings: tuple[str, ...]
    truth: TruthScores | None
    floor: Scores | None = None
    runs: tuple[Run, ...] = ()
    steps: tuple[int, ...] = ()
    examples: tuple[Example, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def title(self) -> str:
        """What was evaluated, in a few words."""
        ensemble = f", ensemble of {len(self.runs)}" if len(self.runs) > 1 else ""
        return f"{self.source.name} {self.source.split}, {len(self.source)} images{ensemble}, {self.decoding.title}"

    def results(self) -> dict[str, Any]:
        """Everything except the captions, for JSON."""
        results: dict[str, Any] = {
            "dataset": self.source.name,
            "split": self.source.split,
            "fingerprint": self.source.fingerprint,
            "decoding": decoding_fields(self.decoding),
            "mean_steps": self.captioned.mean_steps,
            "max_steps": self.captioned.max_steps,
            "scores": _rounded(self.scores),
            "signature": self.scores.signature,
            "degeneration": asdict(self.degeneration),
        }
        if self.floor is not None:
            results["scores_of_other_photos_captions"] = _rounded(self.floor)
        if self.truth is not None:
            results["truth"] = asdict(self.truth)
        return results


def start_name(run: Run) -> str | None:
    """The run that a run started from, as it is stored with scores; None: it started from fresh weights."""
    return None if run.init_from is None else shown(run.init_from.absolute())


def decoding_fields(decoding: Decoding) -> dict[str, Any]:
    """The settings as they are stored with scores. Rules are stored by their representation."""
    values = {item.name: getattr(decoding, item.name) for item in fields(decoding)}
    own = values.pop("rules")
    return values | ({"rules": [repr(rule) for rule in own]} if own else {})


def _rounded(scores: Scores) -> dict[str, float]:
    return {name: round(value, 6) for name, value in scores.values.items()}


def evaluate(run: Run, split: str, *, cache: Path, decoding: Decoding | None = None, write: bool = True) -> Evaluation:
    """``sweep`` of one run with one setting; None: the run's own."""
    return next(sweep([run], split, cache=cache, decodings=[decoding or run.experiment.decoding], write=write))


def sweep(
    runs: Sequence[Run],
    split: str,
    *,
    cache: Path,
    decodings: Sequence[Decoding],
    dataset: str | None = None,
    floor: bool = False,
    examples: int = 0,
    write: bool = True,
) -> Iterator[Evaluation]:
    """Captions a split with the best parameters of a run or an ensemble, once per setting.

    The captions (and all hypotheses, if there are several per image) and the scores are written into the folder of the
    first run. Of several settings, only those of the run's own decoding are written there; the scores of all of them go
    into the file of its sweeps. With several processes, all of them call this, and the first one writes.

    Args:
        runs: the trained run, or several with the same vocabulary.
        split: "val", "test", ...
        cache: folder of the feature stores.
        decodings: search settings.
        dataset: None: the dataset that the first run validated on.
        floor: also score each caption as that of another image.
        examples: the number of images for which the attention of each word is computed too.
        write: whether results are written.

    Raises:
        UserError: there is no such split, no trained parameters, vocabularies differ, the disk is full, or the
            processes evaluate different things (raised on all of them).
    """
    check_ensemble(runs)
    for decoding, run in itertools.product(decodings, runs):
        check_decoding(decoding, run.vocabulary, run.experiment.decoder)
    first = runs[0].experiment
    name = dataset or parse_mixture(first.data.dataset)[0][0]
    source = open_source(name, split, first.data.data_dir)
    parallel = DataParallel(first.training.parallel)
    chosen = chosen_steps(runs, source, [list(decodings), floor, examples], parallel)
    needed = sorted({*evaluated_images(len(source), parallel), *spread(len(source), examples)})
    members, params, frozen, steps = load_members(
        runs, source, chosen, needed, cache=cache, parallel=parallel, decodings=decodings
    )
    knowledge = {one: knowledge_of(runs[0], one, cache=cache, parallel=parallel) for one in decodings}
    evaluator = SplitEvaluator(members, source, runs[0].vocabulary, parallel, first.metrics, knowledge=knowledge)
    where: dict[str, Any] = {"step": steps[0], "objective": first.objective.title, "init_from": start_name(runs[0])}
    if len(runs) > 1:
        objectives = [run.experiment.objective.title for run in runs]
        where = {"runs": [shown(run.folder) for run in runs], "steps": steps, "objectives": objectives}
    prefix = ("" if len(runs) == 1 else "ensemble_") + ("" if dataset is None else f"{dataset}_")
    sweep_file = runs[0].folder / f"sweep_{prefix}{split}.json"
    if len(decodings) > 1:
        _read_sweep(sweep_file)  # a damaged file is reported before hours of decoding
    for decoding in decodings:
        captioned = evaluator.caption(params, frozen, decoding)
        scores = evaluator.score(captioned.captions)
        degeneration, warnings = evaluator.degeneration(captioned)
        evaluation = Evaluation(
            source,
            decoding,
            scores,
            captioned,
            degeneration,
            (*scores.warnings, *naming_run(warnings, runs[0].folder)),
            _truth(source, captioned.captions, evaluator.references),
            evaluator.score_of_other_photos(captioned.captions) if floor else None,
            tuple(runs),
            tuple(steps),
            evaluator.examples(params, frozen, captioned, examples) if examples else (),
        )
        results = {**where, **evaluation.results()}
        writes = write and is_first_process()
        if writes and (len(decodings) == 1 or (len(runs) == 1 and decoding == first.decoding)):
            _write(runs[0].folder, f"{prefix}{split}", captioned, evaluator.file_names, results)
            suffix = split if dataset is None else f"{dataset}_{split}"
            write_references(runs[0].folder / f"references_{suffix}.json", evaluator.references, evaluator.file_names)
            names = [f"{kind}_{prefix}{split}.json" for kind in ("captions", "n_best", "scores")]
            names.append(f"references_{suffix}.json")
            push(runs[0].folder, names)
            paths = (runs[0].folder / name for name in names)
            evaluation = replace(evaluation, files=tuple(path for path in paths if path.is_file()))
        if writes and len(decodings) > 1:
            _add_to_sweep(sweep_file, results)
            push(runs[0].folder, [sweep_file.name])
            evaluation = replace(evaluation, files=(*evaluation.files, sweep_file))
        yield evaluation


def chosen_steps(
    runs: Sequence[Run], source: CaptionSource, settings: Sequence[Any], parallel: DataParallel
) -> list[int | None]:
    """The step of the parameters of each run: that of the best ones that the first process finds. None: it finds none.

    A run can be evaluated while it is trained, so another process can find later ones.

    Args:
        runs: the runs.
        source: the split.
        settings: what else the results depend on.
        parallel: the devices.

    Raises:
        UserError: on all processes: they evaluate different things, or one of them lacks these parameters.
    """
    folders = [run.folder / CHECKPOINTS / "best" for run in runs]
    steps: list[int | None] = [latest_step(folder) for folder in folders]
    if jax.process_count() == 1:
        return steps
    differ = UserError(
        "the processes evaluate different runs, data or settings; use the same command and the same files on all of "
        "them"
    )
    models = [(signature(run.experiment), run.vocabulary.words) for run in runs]
    data = source.name, source.split, source.fingerprint, source.image_ids()
    if not parallel.same((len(runs), models, data, settings)):
        raise differ
    shared = parallel.broadcast_all([-1 if step is None else step for step in steps])
    chosen = [None if step < 0 else step for step in shared]
    there = [
        best is not None if step is None else (folder / str(step)).is_dir()
        for folder, best, step in zip(folders, steps, chosen, strict=True)
    ]
    if not parallel.same(there):
        raise differ
    return chosen


def naming_run(warnings: Sequence[str], folder: Path) -> list[str]:
    """The warnings, with the run in the commands that they suggest."""
    return [line.replace("imgcap evaluate ", f"imgcap evaluate {shlex.quote(shown(folder))} ") for line in warnings]


def _read_sweep(path: Path) -> list[dict[str, Any]]:
    """The results of earlier sweeps; none if there is no file. Raises UserError if it is damaged."""
    if not path.exists():
        return []
    advice = "it has the results of earlier sweeps; move it away"
    before = read_json(path, advice)
    with reading(path, advice):
        if not isinstance(before, list) or not all(isinstance(one, dict) for one in before):
            raise ValueError("it must be a list of results")
    return before


def _add_to_sweep(path: Path, results: dict[str, Any]) -> None:
    """Adds results to the file of a run's sweeps. Results of the same settings and checkpoints are replaced."""
    before = _read_sweep(path)
    results = json.loads(json.dumps(results))  # without tuples, as read from a file
    same = ("step", "runs", "steps", "decoding")
    others = [one for one in before if any(one.get(name) != results.get(name) for name in same)]
    write_text(path, json.dumps([*others, results], indent=2) + "\n")


def _write(
    folder: Path, name: str, captioned: Captioned, file_names: Mapping[int, str], results: Mapping[str, Any]
) -> None:
    (folder / f"n_best_{name}.json").unlink(missing_ok=True)  # from another decoding
    write_results(folder / f"captions_{name}.json", captioned.captions, file_names)
    if any(len(found) > 1 for found in captioned.hypotheses.values()):
        n_best = [
            {"image_id": image_id, "file_name": file_names[image_id], "captions": [asdict(one) for one in found]}
            for image_id, found in captioned.hypotheses.items()
        ]
        write_text(folder / f"n_best_{name}.json", json.dumps(n_best, indent=1) + "\n")
    write_text(folder / f"scores_{name}.json", json.dumps(results, indent=2) + "\n")


def _truth(
    source: CaptionSource, captions: Mapping[int, str], references: Mapping[int, Sequence[str]]
) -> TruthScores | None:
    """Whether captions of drawn scenes are true; None for photos, for which this is not known."""
    if not source[0].scene:
        return None
    scenes = {example.image_id: Scene.from_json(example.scene) for example in source}
    return judge(captions, scenes, references)
