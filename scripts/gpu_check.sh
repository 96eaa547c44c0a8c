#!/usr/bin/env bash
# For whoever has a GPU (or TPU): correctness against the CPU, and all benchmarks, within ten minutes.
#   scripts/gpu_check.sh                    needs a Python with jax, flax and optax; nothing is installed or downloaded
#   scripts/gpu_check.sh --platform cpu     the CPU against itself at tiny sizes, which checks this script
# PYTHON chooses the interpreter, SECONDS_LIMIT another time limit than 600. The output is the report; please keep all of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
limit="${SECONDS_LIMIT:-600}"
export PYTHONPATH="$PWD:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}" TF_CPP_MIN_LOG_LEVEL=2

sizes=(--rounds 3)
if [ "${1:-}" = --platform ] && [ "${2:-}" = cpu ]; then
  export JAX_PLATFORMS=cpu
  sizes=(--rounds 1 --batch 2 --captions 2 --regions 3 --vocabulary 200 --lengths captions --steps 2 --members 2)
elif ! backend="$("$python" -c 'import jax; print(jax.default_backend())')"; then
  echo "gpu_check: $python cannot import JAX or start it; set PYTHON to an interpreter with jax, flax and optax" >&2
  exit 2
elif [ "$backend" = cpu ]; then
  echo "gpu_check: JAX sees only the CPU; install JAX for the GPU, or use --platform cpu" >&2
  exit 2
else
  unset JAX_PLATFORMS # the CPU must be there too, to compare with
fi
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
fi

failed=()
part() {
  echo
  echo "== $* ($SECONDS s)"
  timeout "$((limit - SECONDS > 10 ? limit - SECONDS : 10))" "$python" "$@" || failed+=("$*")
}
part scripts/gpu_check.py "$@"
left=$((limit - SECONDS > 20 ? limit - SECONDS - 10 : 10)) # the table needs a moment
part scripts/benchmark.py train decode scst input population checkpoint --dtype bfloat16 --seconds "$left" "${sizes[@]}"
if [ "${JAX_PLATFORMS:-}" != cpu ]; then
  left=$((limit - SECONDS > 20 ? limit - SECONDS - 10 : 10))
  part scripts/benchmark.py train --dtype float32 --seconds "$left" "${sizes[@]}"
fi
echo
echo "finished in $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed, or out of time: %s\n' "${failed[@]}" >&2
  exit 1
fi
