"""Speed, as ratios within one run: against plain matrix products, and side by side with PyTorch.

    python scripts/benchmark.py encoder          extraction, beside the same network in PyTorch
    python scripts/benchmark.py finetune         a step that trains encoder and decoder: time, memory, checkpointing
    python scripts/benchmark.py train            a training step, as a share of the plain matmul rate, beside PyTorch
    python scripts/benchmark.py decode           greedy and beam search, captions/s, beside PyTorch
    python scripts/benchmark.py decoders         training steps of every decoder on Flickr8k (needs TFDS)
    python scripts/benchmark.py scst             a step of self-critical training, beside the same with the reward
                                                 computed on the host (needs pycocoevalcap)
    python scripts/benchmark.py score CAPTIONS REFERENCES
                                                 scores of COCO-format files, beside the official tools (needs Java
                                                 and pycocoevalcap): time and memory, start-up included

`encoder` and `finetune` take --network: resnet50, resnet101, resnet152, vgg16, vgg16_bn, vgg19, vgg19_bn or
efficientnet_lite0 to 4, with random weights.

Rounds of the things compared are interleaved and medians given, for machines are noisy. Only JAX, flax and optax
are needed (PyTorch for the comparisons), so that it also runs where there is no TFDS.
"""

import argparse
import os

import benchmark_decoders
import benchmark_encoders
import benchmark_scores
import benchmark_self_critical
import jax


def main() -> None:
    """Parses the command line and runs one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("encoder", "finetune", "train", "decode", "decoders", "scst", "score"))
    parser.add_argument("files", nargs="*", help="score: captions and references")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--network", default="resnet50", help="encoder, finetune: see above")
    parser.add_argument("--size", type=int, default=224, help="encoder, finetune: side of the images")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="PyTorch's threads; JAX takes all cores",
    )
    parser.add_argument("--trainable-stages", type=int, default=2, help="finetune: how many of the last stages")
    parser.add_argument("--batch", type=int, help="images (encoder and finetune 32, train and decode 64, scst 50)")
    parser.add_argument("--captions", type=int, default=5, help="finetune, train: captions an image (M); scst: samples")
    parser.add_argument("--regions", type=int, default=49)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument(
        "--decoder", choices=tuple(benchmark_decoders.DECODERS), default="up_down", help="train, decode, scst"
    )
    parser.add_argument(
        "--lengths",
        choices=("full", "captions"),
        default="full",
        help="train: captions that fill all T = 22 places, or of lengths as in COCO",
    )
    parser.add_argument("--ema", type=float, default=0.0, help="train: decay of averaged parameters; 0: none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {len(jax.devices())} x {device.device_kind} ({device.platform}), {options.dtype}")
    benchmarks = {
        "encoder": benchmark_encoders.encoder,
        "finetune": benchmark_encoders.finetune,
        "train": benchmark_decoders.train,
        "decode": benchmark_decoders.decode,
        "decoders": benchmark_decoders.decoders,
        "scst": benchmark_self_critical.self_critical_benchmark,
        "score": benchmark_scores.score,
    }
    benchmarks[options.what](options)


if __name__ == "__main__":
    main()
