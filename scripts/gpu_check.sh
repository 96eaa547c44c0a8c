#!/usr/bin/env bash
# For whoever has a GPU (or TPU): correctness against the CPU, and all benchmarks, within ten minutes.
#   scripts/gpu_check.sh                    needs a Python with jax, flax and optax; nothing is installed or downloaded
#   scripts/gpu_check.sh --platform cpu     the CPU against itself at tiny sizes, which checks this script
# PYTHON chooses the interpreter. The output is the report; please keep all of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}" TF_CPP_MIN_LOG_LEVEL=2

sizes=(--rounds 5)
dtypes=(bfloat16 float32)
if [ "${1:-}" = --platform ] && [ "${2:-}" = cpu ]; then
  export JAX_PLATFORMS=cpu
  sizes=(--rounds 1 --batch 2 --captions 2 --regions 3 --vocabulary 200 --lengths captions --steps 2 --members 2)
  dtypes=(float32)
elif ! "$python" -c 'import jax; raise SystemExit(jax.default_backend() == "cpu")'; then
  echo "gpu_check: JAX sees only the CPU; install JAX for the GPU, or use --platform cpu" >&2
  exit 2
else
  unset JAX_PLATFORMS # the CPU must be there too, to compare with
fi
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

failed=()
part() {
  echo
  echo "== $* ($SECONDS s)"
  # Ten minutes in all: no part may take more than what is left.
  timeout "$((LIMIT - SECONDS > 10 ? LIMIT - SECONDS : 10))" "$python" "$@" || failed+=("$2")
}
LIMIT="${LIMIT:-600}"
part scripts/gpu_check.py "$@"
for dtype in "${dtypes[@]}"; do
  for what in train decode scst; do
    part scripts/benchmark.py "$what" "${sizes[@]}" --dtype "$dtype"
  done
done
part scripts/benchmark.py input "${sizes[@]}" --dtype "${dtypes[0]}"
part scripts/benchmark.py population "${sizes[@]}" --dtype "${dtypes[0]}"
part scripts/benchmark.py checkpoint "${sizes[@]}" --dtype "${dtypes[0]}"
echo
echo "finished in $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed, or out of time: ${failed[*]}" >&2
  exit 1
fi
