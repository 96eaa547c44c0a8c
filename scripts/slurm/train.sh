#!/usr/bin/env bash
# Trains on the GPUs of one or several nodes of a Slurm cluster, one process per GPU. The job goes on by itself after a
# preemption and after the time limit, until training has finished.
#   scripts/slurm/train.sh EXPERIMENT [OPTIONS OF imgcap train]
# --dry-run, anywhere, prints the commands and runs none. --help prints this.
# Submit it from the clone. --run must be on a disk that all nodes share (default: runs/EXPERIMENT in the current folder).
#
# The settings are variables: NODES (1), GPUS per node (4), CPUS per GPU (8), HOURS (24), PARTITION, ACCOUNT, and VENV, the
# virtual environment (.venv), which needs JAX for GPUs: .venv/bin/pip install -c constraints.txt "jax[cuda12]".
set -euo pipefail

fail() {
  echo "train.sh: $1" >&2
  exit 2
}

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

dry=
for argument in "$@"; do # each goes to the end, except for these
  shift
  case "$argument" in
    --dry-run) dry=1 ;;
    -h | --help)
      usage
      exit
      ;;
    *) set -- "$@" "$argument" ;;
  esac
done
gpus="${GPUS:-4}"
srun=(srun "${VENV:-.venv}/bin/imgcap" train)

if [ -z "${SLURM_JOB_ID:-}" ] || [ -n "$dry" ]; then
  if [ $# = 0 ]; then
    usage
    exit 2
  fi
  [[ "$1" != -* ]] || fail "$1 is no experiment; it comes first, such as: coco $1"
  for variable in NODES GPUS CPUS HOURS; do
    value="${!variable:-1}" # their defaults are whole numbers
    [[ "$value" =~ ^[1-9][0-9]*$ ]] || fail "$variable=$value must be a whole number above 0"
  done
  # 120 s before the time limit, Slurm sends USR1 to this script.
  submit=(sbatch --job-name="imgcap-$(basename "$1" .py)" --nodes="${NODES:-1}" --ntasks-per-node="$gpus"
    --gpus-per-node="$gpus" --cpus-per-task="${CPUS:-8}" --time="${HOURS:-24}:00:00" --requeue --open-mode=append
    --signal=B:USR1@120 --output=%x-%j.log)
  [ -z "${PARTITION:-}" ] || submit+=(--partition="$PARTITION")
  [ -z "${ACCOUNT:-}" ] || submit+=(--account="$ACCOUNT")
  submit+=("${BASH_SOURCE[0]}" "$@")
  if [ -n "$dry" ]; then
    printf '%q ' "${submit[@]}"
    printf '\n%s\n' "# in the job:"
    printf '%q ' "${srun[@]}" "$@" --distributed
    echo
    exit 0
  fi
  command -v sbatch >/dev/null || fail "sbatch is not installed; submit on a login node of the Slurm cluster"
  exec "${submit[@]}"
fi

# Training saves a checkpoint on SIGTERM. After the time limit the job is queued again; after a preemption Slurm does it.
limit=
trap 'limit=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # reaches the processes of the job, not this script
trap : TERM
"${srun[@]}" "$@" --distributed &
code=0
while true; do
  code=0
  wait $! || code=$?
  kill -0 $! 2>/dev/null || break # a signal interrupts wait
done
if [ -n "$limit" ] && [ "$code" != 0 ]; then
  echo "time limit; queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
