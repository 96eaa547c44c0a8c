"""Speed benchmarks, as ratios within one run to plain matrix products, to PyTorch and to another checkout.

    python scripts/benchmark.py encoder          feature extraction, compared with the same network in PyTorch
    python scripts/benchmark.py finetune         a training step of encoder and decoder: time, memory, checkpointing
    python scripts/benchmark.py train            a training step, compared with the plain matmul rate and PyTorch
    python scripts/benchmark.py decode           captions/s of greedy and beam search, compared with PyTorch
    python scripts/benchmark.py decoders         training steps of every decoder on Flickr8k (needs TFDS)
    python scripts/benchmark.py scst             a step of self-critical training, compared with PyTorch and with the
                                                 reward computed on the host (needs pycocoevalcap)
    python scripts/benchmark.py input            training steps with batches from the host and from device memory
    python scripts/benchmark.py population       training steps of several runs as one program, and one after another
    python scripts/benchmark.py checkpoint       how long training stands still while a checkpoint is saved
    python scripts/benchmark.py score CAPTIONS REFERENCES
                                                 time and memory of scoring COCO-format files, including start-up,
                                                 compared with the official tools (needs Java and pycocoevalcap)

`encoder` and `finetune` use --network: resnet50, resnet101, resnet152, vgg16, vgg16_bn, vgg19, vgg19_bn,
efficientnet_lite0 to 4, or the name of a ViT or ConvNeXt, such as vit_base_patch16_clip_224, with random weights.

`train`, `decode` and `scst` measure captions that are all as long as possible (20 words) and captions of real lengths.
They and `checkpoint` compare with another checkout of imgcap_jax in the same rounds:

    git worktree add ../before HEAD~1
    python scripts/benchmark.py train --before ../before

Several benchmarks run one after another, each in a process of its own, once per type, and one table ends the report:

    python scripts/benchmark.py train decode scst input population checkpoint --dtype float32 bfloat16

"model GFLOP" counts the model's matrix products. "of matmul rate" divides their rate by that of plain products in the
same rounds, of 2048 x 2048 matrices on a CPU and 8192 x 8192 elsewhere. "first call" (the first round of `input` and
`population`) includes compilation.

The rounds of all candidates are interleaved and medians are reported, because timings on most machines are noisy. The
first lines say how fast the machine multiplies matrices, because machines of the same name differ by a factor of two or
three. The benchmarks need only JAX, Flax and Optax, and PyTorch for the comparisons, unless noted otherwise above.
scripts/gpu_check.sh runs them on a machine with a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import benchmark_checkpoint
import benchmark_decoders
import benchmark_encoders
import benchmark_feeds
import benchmark_scores
import benchmark_self_critical
from measuring import PACKAGE, Row, print_machine, print_memory, table

from imgcap_jax.accelerators import quiet_libtpu

COMPARED = ("train", "decode", "scst", "checkpoint")
BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "encoder": benchmark_encoders.encoder,
    "finetune": benchmark_encoders.finetune,
    "train": benchmark_decoders.train,
    "decode": benchmark_decoders.decode,
    "decoders": benchmark_decoders.decoders,
    "scst": benchmark_self_critical.self_critical_benchmark,
    "input": benchmark_feeds.input_benchmark,
    "population": benchmark_feeds.population,
    "checkpoint": benchmark_checkpoint.checkpoint,
    "score": benchmark_scores.score,
}


def main() -> None:
    """Parses the command line, runs the benchmarks and prints their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", metavar="BENCHMARK", help="one or more of the above; score: and two files")
    parser.add_argument("--rounds", type=int, default=7, help="number of timed rounds")
    parser.add_argument(
        "--before",
        type=Path,
        metavar="FOLDER",
        help="train, decode, scst, checkpoint: another checkout of imgcap_jax to compare with",
    )
    parser.add_argument(
        "--lengths",
        choices=("full", "captions", "both"),
        default="both",
        help="train, decode, scst: captions of 20 words, of real lengths (10.75 words on average), or both",
    )
    parser.add_argument(
        "--decoder",
        choices=benchmark_decoders.DECODERS,
        default="up_down",
        help="train, decode, scst, input, population, checkpoint: the decoder",
    )
    parser.add_argument(
        "--batch",
        type=int,
        help="images per batch (default: encoder and finetune 32, train and decode 64, scst 50; decoders: always 16)",
    )
    parser.add_argument(
        "--captions",
        type=int,
        default=5,
        help="finetune, train: captions per image; scst: samples per image",
    )
    parser.add_argument("--regions", type=int, default=49, help="regions per image (not encoder, finetune)")
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=10_000,
        help="finetune, train, decode, scst, checkpoint: words of the vocabulary",
    )
    parser.add_argument(
        "--ema",
        type=float,
        default=0.0,
        help="train, checkpoint: decay of the moving average of the parameters; 0: none",
    )
    parser.add_argument("--steps", type=int, default=20, help="input, population: steps per round")
    parser.add_argument("--members", type=int, default=8, help="population: number of runs")
    parser.add_argument("--network", default="resnet50", help="encoder, finetune: see above")
    parser.add_argument(
        "--size",
        type=int,
        default=224,
        help="encoder, finetune: side length of the images in pixels",
    )
    parser.add_argument(
        "--trainable-stages",
        type=int,
        default=2,
        help="finetune: number of trained stages, from the last",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=["float32"],
        nargs="+",
        help="all except score: type of matrix products, one or both",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="number of PyTorch threads; JAX uses all cores",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows of the table to this file instead")
    parser.add_argument(
        "--seconds", type=float, help="several benchmarks: stop after this time; those left out are named"
    )
    options = parser.parse_args()
    options.files = []
    if options.what[0] == "score":
        options.what, options.files = options.what[:1], options.what[1:]
    if unknown := [name for name in options.what if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {', '.join(unknown)}; the benchmarks are {', '.join(BENCHMARKS)}")
    if options.before is not None:
        if not set(options.what) <= set(COMPARED):
            parser.error(f"--before is for {', '.join(COMPARED)}; leave it out")
        if not (options.before / PACKAGE / "__init__.py").is_file():
            parser.error(f"--before {options.before} has no folder {PACKAGE}; give the root of another checkout")
    alone = len(options.what) == len(options.dtype) == 1
    rows, failed = (_measured(options), []) if alone else _each(options)
    if options.json is not None:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))
    elif rows:
        print(f"\n{table(rows)}")
    if failed:
        sys.exit(f"benchmark.py: without a result: {', '.join(failed)}")


def _measured(options: argparse.Namespace) -> list[Row]:
    """Runs one benchmark in this process."""
    ((name,), (dtype,)) = options.what, options.dtype
    quiet_libtpu()
    print_machine()
    rows = BENCHMARKS[name](argparse.Namespace(**{**vars(options), "what": name, "dtype": dtype}))
    memory = print_memory()
    return [row._replace(memory=memory) for row in rows]


def _each(options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Runs each benchmark with each type in a process of its own: returns the rows, and the names of those that failed.

    Each process has its own peak memory, and a failure or a crash does not end the others.
    """
    own = {"what", "files", "dtype", "json", "seconds"}
    passed = [
        part
        for name, value in vars(options).items()
        if name not in own and value is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    start, rows, failed = time.monotonic(), [], []
    for dtype in options.dtype:
        for name in options.what:
            gone = time.monotonic() - start
            left = None if options.seconds is None else max(0.0, options.seconds - gone)
            print(f"\n== {name}, {dtype} ({gone:.0f} s)", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "rows.json"
                command = [sys.executable, __file__, name, "--dtype", dtype, "--json", str(file), *passed]
                try:
                    subprocess.run(command, check=True, timeout=left)
                    rows += [Row(**fields) for fields in json.loads(file.read_text())]
                except subprocess.TimeoutExpired:
                    failed.append(f"{name} ({dtype}, out of time)")
                except subprocess.CalledProcessError as error:
                    failed.append(f"{name} ({dtype}, exit code {error.returncode})")
    return rows, failed


if __name__ == "__main__":
    main()
