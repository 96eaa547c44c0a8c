"""Speed benchmarks, as ratios within one run to plain matrix products and to PyTorch.

    python scripts/benchmark.py encoder          feature extraction, compared with the same network in PyTorch
    python scripts/benchmark.py finetune         a training step of encoder and decoder: time, memory, checkpointing
    python scripts/benchmark.py train            a training step, compared with the plain matmul rate and PyTorch
    python scripts/benchmark.py decode           captions/s of greedy and beam search, compared with PyTorch
    python scripts/benchmark.py decoders         training steps of every decoder on Flickr8k (needs TFDS)
    python scripts/benchmark.py scst             a step of self-critical training, compared with the reward computed on
                                                 the host (needs pycocoevalcap)
    python scripts/benchmark.py score CAPTIONS REFERENCES
                                                 time and memory of scoring COCO-format files, including start-up,
                                                 compared with the official tools (needs Java and pycocoevalcap)

`encoder` and `finetune` use --network: resnet50, resnet101, resnet152, vgg16, vgg16_bn, vgg19, vgg19_bn or
efficientnet_lite0 to 4, with random weights.

The rounds of all candidates are interleaved and medians are reported, because timings on most machines are noisy. The
benchmarks need only JAX, Flax and Optax, and PyTorch for the comparisons, unless noted otherwise above.
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
    parser.add_argument("files", nargs="*", help="score: the files CAPTIONS and REFERENCES")
    parser.add_argument("--rounds", type=int, default=7, help="number of timed rounds")
    parser.add_argument("--network", default="resnet50", help="encoder, finetune: see above")
    parser.add_argument("--size", type=int, default=224, help="encoder, finetune: side length of the images in pixels")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="number of PyTorch threads; JAX uses all cores",
    )
    parser.add_argument(
        "--trainable-stages", type=int, default=2, help="finetune: number of trained stages, from the last"
    )
    parser.add_argument(
        "--batch", type=int, help="images per batch (default: encoder and finetune 32, train and decode 64, scst 50)"
    )
    parser.add_argument(
        "--captions", type=int, default=5, help="finetune, train: captions per image; scst: samples per image"
    )
    parser.add_argument("--regions", type=int, default=49)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument(
        "--decoder", choices=tuple(benchmark_decoders.DECODERS), default="up_down", help="train, decode, scst"
    )
    parser.add_argument(
        "--lengths",
        choices=("full", "captions"),
        default="full",
        help="train: captions that fill all T = 22 positions, or with lengths as in COCO",
    )
    parser.add_argument(
        "--ema", type=float, default=0.0, help="train: decay of the moving average of the parameters; 0: none"
    )
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
