"""Whether an accelerator computes what a CPU computes: training steps, search and encoder, in float32 and bfloat16.

    python scripts/gpu_check.py                   the default platform of JAX (gpu, tpu) against the CPU, in one process
    python scripts/gpu_check.py --platform cpu    the CPU against itself, which checks this script

Everything is compared with float32 on the CPU. On a TPU, training steps are compared without dropout, because TPUs drop
other units than CPUs and GPUs. Each line has the difference and its tolerance. The exit code is 1 if a
tolerance is exceeded. It needs JAX, Flax and Optax alone; the folder of the clone must be in PYTHONPATH.
scripts/gpu_check.sh also runs the benchmarks.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmark_decoders import built_decoder, rows_of
from benchmark_self_critical import padded_references, random_references
from flax import nnx
from measuring import at_precision, random_captions, regions_of

SIZES = {"B": 8, "M": 3, "T": 14, "D": 96, "H": 64, "V": 300, "N": 12}
DTYPES = ("float32", "bfloat16")
# The largest permitted differences from float32 on the CPU, as shares of the norm of what is compared.
TOLERANCES = {
    "cross-entropy, gradient": {"float32": 1e-4, "bfloat16": 0.03},
    "cross-entropy, loss": {"float32": 1e-5, "bfloat16": 1e-3},
    "self-critical, reward": {"float32": 1e-4, "bfloat16": 0.05},
    "self-critical, gradient": {"float32": 1e-3, "bfloat16": 0.3},
    "beam search, words": {"float32": 0.0, "bfloat16": 0.5},
    "beam search, log-probability": {"float32": 1e-4, "bfloat16": 0.01},
    "encoder, regions": {"float32": 1e-4, "bfloat16": 0.05},
}
NOTES = {
    "self-critical, gradient": "some samples differ in bfloat16",
    "beam search, words": "share of images with other captions",
}


@dataclass
class Checks:
    """What each side computed, by name; the sides are (device, dtype)."""

    values: dict[str, Any] = field(default_factory=dict)

    def __call__(self, name: str, value: Any) -> None:
        self.values[name] = np.asarray(value, np.float64)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def _model(dtype: str, *, dropout: bool = True) -> tuple[Any, Any, Any]:
    from imgcap_jax.models.model import CaptionModel, split_trained

    decoder = built_decoder(argparse.Namespace(decoder="up_down", dtype=dtype), SIZES)
    if not dropout:
        decoder.rate = 0.0
    return split_trained(CaptionModel(None, decoder, dtype=dtype))


def _ran(
    step: Any, constants: Any, params: Any, batch: Any, device: Any, dtype: str
) -> tuple[np.ndarray, dict[str, float]]:
    """The change of the parameters by one step of plain gradient descent, and the metrics."""
    from imgcap_jax.training.parallel import DataParallel
    from imgcap_jax.training.step import first_state

    parallel = DataParallel("shard_map", [device])
    before = _flat(params)
    state = parallel.replicate(first_state(jax.tree.map(np.asarray, params), optax.sgd(1.0), ema=False))
    state, metrics = parallel.compile(at_precision(step, dtype))(
        state, parallel.replicate(constants), parallel.put(batch)
    )
    return _flat(state.params) - before, {name: float(value) for name, value in metrics.items()}


def cross_entropy(check: Checks, device: Any, dtype: str, *, dropout: bool) -> None:
    """A step of teacher forcing."""
    from imgcap_jax.training.cross_entropy import CrossEntropy, cross_entropy_step

    graph, params, frozen = _model(dtype, dropout=dropout)
    batch = rows_of(SIZES) | {"regions": regions_of(SIZES), "tokens": random_captions(SIZES, "captions")}
    step = cross_entropy_step(graph, CrossEntropy(), optax.sgd(1.0), key=jax.random.key(0))
    change, metrics = _ran(step, frozen, params, batch, device, dtype)
    check("cross-entropy, gradient", change)
    check("cross-entropy, loss", metrics["loss"])


def self_critical(check: Checks, device: Any, dtype: str, *, dropout: bool) -> None:
    """A step with the CIDEr-D of sampled captions as reward. The references are captions that the model samples."""
    from imgcap_jax.metrics.cider_device import document_frequencies
    from imgcap_jax.metrics.degeneration_device import FunctionWords
    from imgcap_jax.training.self_critical import Constants, SelfCritical, self_critical_step

    graph, params, frozen = _model(dtype, dropout=dropout)
    references = random_references(SIZES["B"], SIZES["V"], seed=1)
    others = random_references(50, SIZES["V"], seed=2)

    def with_ids(tokens: Any, *rest: Any) -> Any:
        """Captions of random weights have no common words with references; their word ids stand for their quality."""
        return objective.rewards(tokens, *rest) + tokens.sum(-1).astype(jnp.float32) / 1000

    objective = SelfCritical(samples=SIZES["M"])
    step = self_critical_step(
        graph,
        objective,
        optax.sgd(1.0),
        key=jax.random.key(0),
        max_words=SIZES["T"] - 2,
        bad_endings=range(4, 14),
        function_words=FunctionWords(tuple(range(4, 44)), (4, 5, 6)),
        rewards=with_ids,
    )
    batch = rows_of(SIZES) | {
        "regions": regions_of(SIZES),
        "references": padded_references(references),
        "reference_count": np.array([len(of) for of in references], np.float32),
    }
    constants = Constants(frozen, document_frequencies([*references, *others], SIZES["V"]), None)
    change, metrics = _ran(step, constants, params, batch, device, dtype)
    check("self-critical, reward", metrics["reward"])
    check("self-critical, gradient", change)


def search(check: Checks, device: Any, dtype: str, **_: bool) -> None:
    """Beam search with 3 beams."""
    from imgcap_jax.data.vocabulary import Vocabulary
    from imgcap_jax.decoding.settings import Decoding
    from imgcap_jax.run.generation import caption_function

    graph, params, frozen = _model(dtype)
    vocabulary = Vocabulary.build(map(str, range(SIZES["V"] - 4)), min_count=1)
    captions = caption_function([graph], Decoding(beam=3, max_words=SIZES["T"] - 2), vocabulary)
    with jax.default_device(device):
        held = jax.device_put((params, frozen, regions_of(SIZES).astype(np.float32)), device)
        decoded = captions([held[0]], [held[1]], [{"regions": held[2]}])
    check("beam search, words", decoded.tokens[:, 0])
    check("beam search, log-probability", decoded.log_prob[:, 0])


def encoder(check: Checks, device: Any, dtype: str, **_: bool) -> None:
    """ResNet-50 with random weights, on images of 96 pixels."""
    from imgcap_jax.models.encoders.resnet import ResNet

    images = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)
    network = ResNet(depth=50, weights="random").build(96, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    graph, state = nnx.split(network)
    encode = jax.jit(at_precision(lambda state, images: nnx.merge(graph, state)(images), dtype))
    with jax.default_device(device):
        check("encoder, regions", encode(*jax.device_put((state, images), device)))


PARTS: tuple[Callable[..., None], ...] = (cross_entropy, self_critical, search, encoder)


def _difference(name: str, ours: np.ndarray, expected: np.ndarray) -> float:
    if name == "beam search, words":
        return float(np.mean((ours != expected).any(axis=-1)))
    return float(np.linalg.norm(ours - expected) / max(float(np.linalg.norm(expected)), 1e-30))


def main() -> int:
    """Prints one line per comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", default=jax.default_backend(), help="what is checked (default: JAX's default)")
    options = parser.parse_args()
    device, cpu = jax.devices(options.platform)[0], jax.devices("cpu")[0]
    print(f"{device.device_kind} ({device.platform}) against the CPU, jax {jax.__version__}")
    print("differences from float32 on the CPU, as shares of the norm")
    failed, dropout = 0, device.platform != "tpu"
    for part in PARTS:
        expected = Checks()
        part(expected, cpu, "float32", dropout=dropout)
        for dtype in DTYPES:
            found, start = Checks(), time.perf_counter()
            part(found, device, dtype, dropout=dropout)
            seconds = time.perf_counter() - start
            for name, value in found.values.items():
                difference, tolerance = _difference(name, value, expected.values[name]), TOLERANCES[name][dtype]
                ok = np.isfinite(difference) and difference <= tolerance
                failed += not ok
                judged, note = "ok  " if ok else "FAIL", f"  {NOTES[name]}" if name in NOTES else ""
                print(f"{judged} {name:30} {dtype:9} {difference:8.1e} of at most {tolerance:7.0e}{note}", flush=True)
            if part is cross_entropy:
                again = Checks()
                part(again, device, dtype, dropout=dropout)
                same = np.array_equal(found.values["cross-entropy, gradient"], again.values["cross-entropy, gradient"])
                print(f"     two steps have {'the same bits' if same else 'other bits'} ({dtype})")
            print(f"     {seconds:.1f} s with compilation", flush=True)
    print(f"{failed} differences are too large" if failed else "all differences are within their tolerances")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
