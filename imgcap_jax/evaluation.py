"""Decoding and scoring a whole split, after every epoch of training and on demand."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from imgcap_jax.data.pipeline import CaptionData, EvalBatches, eval_batches
from imgcap_jax.data.regions import RegionSource
from imgcap_jax.data.scene_truth import TruthScores, judge
from imgcap_jax.data.scenes import Scene
from imgcap_jax.data.sources import CaptionSource, open_source, parse_mixture
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.extraction import Extraction, uses_store
from imgcap_jax.files import write_text
from imgcap_jax.generation import Decoding, caption_function
from imgcap_jax.metrics.coco_format import write_results
from imgcap_jax.metrics.scoring import CaptionScorer, Scores
from imgcap_jax.models.model import CaptionModel, Frozen, Params, split_trained
from imgcap_jax.run import Run
from imgcap_jax.training.checkpoints import Checkpoints
from imgcap_jax.training.losses import LossSums, caption_loss
from imgcap_jax.training.parallel import DataParallel

BATCH = 64  # images decoded at a time


@dataclass(frozen=True)
class Captioned:
    """captions: image id -> sentence. mean_steps: decoder steps a batch took. images_per_second: all in all."""

    captions: dict[int, str]
    mean_steps: float
    images_per_second: float


class SplitEvaluator:
    """Captions one split with given parameters, and scores the captions.

    References are tokenised once, so that scoring after every epoch costs the candidates only.
    """

    def __init__(
        self,
        graph: nnx.GraphDef[CaptionModel],
        data: CaptionData,
        source: CaptionSource,
        vocabulary: Vocabulary,
        parallel: DataParallel,
        *,
        store: RegionSource | None,
    ) -> None:
        self.source = source
        self._graph, self._data, self._vocabulary = graph, data, vocabulary
        self._parallel, self._store = parallel, store
        self._ids = [int(image_id) for image_id in source.image_ids()]
        self.references = {image_id: source.captions(i) for i, image_id in enumerate(self._ids)}
        self._scorer = CaptionScorer(self.references)
        self._functions: dict[Decoding, Any] = {}
        devices = len(parallel.devices)
        self._size = -(-min(BATCH, len(source)) // devices) * devices
        self._images = eval_batches(data, source, batch_size=self._size, features=store)
        self._with_tokens: EvalBatches | None = None
        self._teacher_forced = jax.jit(self._loss_sums)

    def caption(self, params: Params, frozen: Frozen, decoding: Decoding) -> Captioned:
        """Decodes the whole split."""
        if decoding not in self._functions:
            self._functions[decoding] = caption_function(self._graph, decoding)
        captions: dict[int, str] = {}
        steps: list[int] = []
        start = time.perf_counter()
        for batch, first in self._on_devices(self._images):
            decoded = self._functions[decoding](params, frozen, batch)
            tokens = self._parallel.fetch(decoded.tokens)[:, 0]
            steps.append(int(decoded.steps))
            for row, image_id in enumerate(self._ids[first : first + len(tokens)]):
                captions[image_id] = self._vocabulary.decode(tokens[row])
        seconds = time.perf_counter() - start
        return Captioned(captions, float(np.mean(steps)), len(captions) / seconds)

    def score(self, captions: Mapping[int, str]) -> Scores:
        """BLEU, CIDEr-D and whatever else the scorer knows."""
        return self._scorer.score(captions)

    def teacher_forced(self, params: Params, frozen: Frozen) -> dict[str, float]:
        """Loss and perplexity a word with the true words given: a diagnostic, never a basis for selection."""
        if self._with_tokens is None:  # made once: it encodes all captions
            self._with_tokens = eval_batches(
                self._data, self.source, batch_size=self._size, features=self._store, vocabulary=self._vocabulary
            )
        log_likelihood = words = 0.0
        for batch, _ in self._on_devices(self._with_tokens):
            sums = self._teacher_forced(params, frozen, batch)
            log_likelihood += float(sums.log_likelihood)
            words += float(sums.words)
        loss = -log_likelihood / max(words, 1.0)
        return {"teacher_forced_loss": loss, "teacher_forced_perplexity": float(np.exp(loss))}

    def _loss_sums(self, params: Params, frozen: Frozen, batch: Mapping[str, Array]) -> LossSums:
        model = nnx.merge(self._graph, params, frozen)
        hidden = model.teacher_forced(batch).hidden
        return caption_loss(model.score_words, hidden, batch["tokens"], batch["weight"])

    def _on_devices(self, batches: EvalBatches) -> Iterator[tuple[dict[str, Array], int]]:
        """Batches on the devices, and the number of the first image in each."""
        for number, batch in enumerate(batches):
            del batch["image_id"]  # 64 bits, which stay on the host
            yield self._parallel.put_rows(batch), number * self._size


@dataclass(frozen=True)
class Evaluation:
    """The scores of a run on a split; truth only for drawn scenes."""

    source: CaptionSource
    decoding: Decoding
    scores: Scores
    captioned: Captioned
    truth: TruthScores | None

    @property
    def title(self) -> str:
        """What was evaluated, in a few words."""
        search = "greedy" if self.decoding.beam == 1 else f"beam {self.decoding.beam}"
        return f"{self.source.name} {self.source.split}, {len(self.source)} images, {search}"


def evaluate(
    run: Run,
    split: str,
    *,
    cache: Path,
    dataset: str | None = None,
    decoding: Decoding | None = None,
) -> Evaluation:
    """Captions a split with the run's best parameters and writes captions and scores into the run.

    Args:
        run: the trained run.
        split: "val", "test", ...
        cache: folder of the feature stores.
        dataset: another dataset than the one the run validated on.
        decoding: other search settings than the run's.

    Raises:
        UserError: no such split, no trained parameters, a full disk.
    """
    experiment = run.experiment
    decoding = decoding or experiment.decoding
    name = dataset or parse_mixture(experiment.data.dataset)[0][0]
    source = open_source(name, split, experiment.data.data_dir)
    stored = uses_store(experiment)
    store = Extraction(experiment, cache).regions(source, views=1) if stored else None
    parallel = DataParallel(experiment.training.parallel)
    graph, params, frozen = split_trained(run.model(with_encoder=not stored))
    checkpoints = Checkpoints(run.folder)
    params = checkpoints.restore_best(parallel.replicate(params))
    step = checkpoints.best_step
    checkpoints.close()
    evaluator = SplitEvaluator(graph, experiment.data, source, run.vocabulary, parallel, store=store)
    captioned = evaluator.caption(params, parallel.replicate(frozen), decoding)
    scores = evaluator.score(captioned.captions)
    truth = _truth(source, captioned.captions, evaluator.references)
    results = {
        "dataset": source.name,
        "split": split,
        "step": step,
        "decoding": asdict(decoding),
        "mean_steps": captioned.mean_steps,
        "scores": {name: round(value, 6) for name, value in scores.values.items()},
        "signature": scores.signature,
        **({} if truth is None else {"truth": asdict(truth)}),
    }
    prefix = "" if dataset is None else f"{dataset}_"
    write_results(run.folder / f"captions_{prefix}{split}.json", captioned.captions)
    write_text(run.folder / f"scores_{prefix}{split}.json", json.dumps(results, indent=2) + "\n")
    return Evaluation(source, decoding, scores, captioned, truth)


def _truth(
    source: CaptionSource, captions: Mapping[int, str], references: Mapping[int, Sequence[str]]
) -> TruthScores | None:
    """Whether captions of drawn scenes are true of them; None for photos, whose truth nobody knows."""
    if not source[0].scene:
        return None
    scenes = {example.image_id: Scene.from_json(example.scene) for example in source}
    return judge(captions, scenes, references)
