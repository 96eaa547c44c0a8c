#!/usr/bin/env bash
# For whoever has a GPU (or TPU): correctness against the CPU, and all benchmarks, within ten minutes.
#   scripts/gpu_check.sh                    needs a Python with jax, flax and optax; nothing is installed or downloaded
#   scripts/gpu_check.sh --platform cpu     the CPU against itself at tiny sizes, which checks this script
# PYTHON chooses the interpreter (.venv/bin/python if it exists, otherwise python3), SECONDS_LIMIT another time limit than
# 600. The output is the report; please keep all of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in
  *" --help "* | *" -h "*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/gpu_check.sh
    exit
    ;;
esac
fail() {
  echo "gpu_check: $1" >&2
  exit 2
}
[ $# = 0 ] || { [ $# = 2 ] && [ "$1" = --platform ]; } || fail "unknown arguments: $*; use none, or --platform cpu"
python="${PYTHON:-}"
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python; } || python=python3
limit="${SECONDS_LIMIT:-600}"
export PYTHONPATH="$PWD:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}" TF_CPP_MIN_LOG_LEVEL=2

sizes=(--rounds 3)
[ "${2:-}" != cpu ] || export JAX_PLATFORMS=cpu
errors="$(mktemp)"
trap 'rm -f "$errors"' EXIT
start='
import sys
try:
    import jax, flax, optax
    print(jax.default_backend())
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}".splitlines()[0])'
if ! backend="$("$python" -c "$start" 2>"$errors")"; then
  reason="$(tail -n 1 "$errors")"
  fail "$python cannot import JAX or start it${reason:+ ($reason)}; set PYTHON to one with jax, flax and optax"
fi
cat "$errors" >&2 # warnings
if [ "${2:-}" = cpu ]; then
  sizes=(--rounds 1 --batch 2 --captions 2 --regions 3 --vocabulary 200 --lengths captions --steps 2 --members 2)
elif [ "$backend" = cpu ]; then
  fail "JAX sees only the CPU; install JAX for the GPU, or use --platform cpu"
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
benchmarks() {
  local left=$((limit - SECONDS > 20 ? limit - SECONDS - 10 : 10)) # the table needs a moment
  part scripts/benchmark.py "$@" --seconds "$left" "${sizes[@]}"
}
part scripts/gpu_check.py "$@"
benchmarks train decode scst input population checkpoint --dtype bfloat16
if [ "${JAX_PLATFORMS:-}" != cpu ]; then
  benchmarks train --dtype float32
fi
echo
echo "finished in $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed, or out of time: %s\n' "${failed[@]}" >&2
  exit 1
fi
