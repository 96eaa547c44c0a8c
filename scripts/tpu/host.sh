#!/usr/bin/env bash
# What tpu.sh runs on each host of a TPU, in the copy of the clone.
#   scripts/tpu/host.sh install COMMIT                 makes .venv with JAX for TPU, and then the file "installed"
#   scripts/tpu/host.sh launch EXPERIMENT [OPTIONS]    starts training in the background; its output goes to train.log
#   scripts/tpu/host.sh status                         "training", or "ended" and the exit code
#   scripts/tpu/host.sh stop                           SIGTERM, and SIGKILL after a minute
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

training() {
  [ -f train.pid ] && kill -0 "$(cat train.pid)" 2>/dev/null
}

# The hosts have Python 3.10; uv brings a newer one.
install() {
  local uv="$HOME/.local/bin/uv" commit="$1"
  [ -x "$uv" ] || curl -LsSf https://astral.sh/uv/install.sh | sh
  [ -x .venv/bin/python ] || "$uv" venv --python 3.12 .venv
  "$uv" pip install --python .venv/bin/python -c constraints.txt "jax[tpu]" gcsfs -e .
  echo "$commit" >installed
}

launch() {
  if training; then
    echo "already training"
    return
  fi
  rm -f train.exit
  # shellcheck disable=SC2016 # expanded by the inner shell
  setsid nohup bash -c '
    .venv/bin/imgcap train "$@" --distributed & echo $! >train.pid
    code=0; wait $! || code=$?; echo "$code" >train.exit' imgcap "$@" >>train.log 2>&1 </dev/null &
  sleep 1
  echo "started; the output is in train.log"
}

stop() {
  local seconds=0
  training || return 0
  kill -TERM "$(cat train.pid)"
  while training; do
    [ "$seconds" -lt 60 ] || kill -KILL "$(cat train.pid)"
    sleep 1
    seconds=$((seconds + 1))
  done
}

status() {
  if training; then
    echo training
  else
    echo "ended $(cat train.exit 2>/dev/null || true)"
  fi
}

case "${1:-}" in
  install | launch | status | stop) "$@" ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/tpu/host.sh
    exit 2
    ;;
esac
