#!/usr/bin/env bash
# Trains on a Cloud TPU VM, or on a slice of several hosts, with gcloud (queued resources).
#   scripts/tpu/tpu.sh create                       asks for the TPU and waits until it is there
#   scripts/tpu/tpu.sh setup                        copies this clone (what is committed) to all hosts and installs it
#   scripts/tpu/tpu.sh launch EXPERIMENT [OPTIONS]  starts imgcap train on all hosts, in the background
#   scripts/tpu/tpu.sh watch                        shows the output of the first host
#   scripts/tpu/tpu.sh stop                         SIGTERM: training saves a checkpoint and ends
#   scripts/tpu/tpu.sh resume EXPERIMENT [OPTIONS]  create, setup and launch, in so far as they are needed
#   scripts/tpu/tpu.sh keep EXPERIMENT [OPTIONS]    resume, every two minutes until training has finished
#   scripts/tpu/tpu.sh delete                       deletes the TPU; runs in gs:// remain
# --dry-run as the first argument prints the commands and runs none.
#
# The settings are variables:
#   TPU_NAME  name (imgcap)            TPU_TYPE  accelerator type (v5litepod-8)     ZONE     zone (required)
#   RUNTIME   software version (chosen by the type)   SPOT=1  can be preempted, cheaper     PROJECT  default: gcloud's
#   DATA      folder of datasets, such as gs://BUCKET/datasets (default: on each host)
#   COMMIT    what setup installs (HEAD; keep: HEAD when it starts)
#   PAUSE     seconds between two looks at the TPU (30; keep: 120)
#   TRIES     keep, and waiting for the TPU, end after this number of failures in a row (30)
# A slice of several hosts needs a run on storage that all of them reach, because training resumes there:
#   ZONE=us-west4-a SPOT=1 TPU_TYPE=v5litepod-16 scripts/tpu/tpu.sh launch coco --run gs://BUCKET/runs/coco
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
action="${1:-}"
[ $# = 0 ] || shift
name="${TPU_NAME:-imgcap}" type="${TPU_TYPE:-v5litepod-8}"

fail() {
  echo "tpu: $1" >&2
  exit 2
}

# Prints a command, and runs it unless this is a dry run.
run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

runtime() {
  case "$type" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

describe() {
  run gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)'
}

# The state of the request: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, ...; MISSING if there is none.
state() {
  local found errors
  errors="$(mktemp)"
  if found="$(describe 2>"$errors")"; then
    cat "$errors" >&2 # warnings
    rm -f "$errors"
    echo "$found"
    return
  fi
  found="$(cat "$errors")"
  rm -f "$errors"
  if [[ "$found" == *NOT_FOUND* || "$found" == *"not found"* ]]; then
    echo MISSING
  else
    fail "$found"
  fi
}

# Waits while the state, which is $1 at first, changes by itself (ACCEPTED, CREATING, WAITING_FOR_RESOURCES,
# PROVISIONING, SUSPENDING, DELETING). Prints the one that stays. That can take hours, in which gcloud can fail.
settled() {
  local now="$1" next failures=0
  while [[ ! "$now" =~ ^(ACTIVE|FAILED|SUSPENDED|MISSING)$ ]]; do
    echo "tpu: $name is $now" >&2
    sleep "${PAUSE:-30}"
    if next="$(state)"; then
      now="$next" failures=0
    else
      failures=$((failures + 1))
      [ "$failures" -lt "${TRIES:-30}" ] || fail "the state of $name is not known, $failures failures in a row"
    fi
  done
  echo "$now"
}

create() {
  local spot=() now
  [ -z "${SPOT:-}" ] || spot=(--spot)
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
    --accelerator-type="$type" --runtime-version="${RUNTIME:-$(runtime)}" "${spot[@]}"
  if [ -n "$dry" ]; then
    describe
    echo "# again, until it is ACTIVE"
    return
  fi
  now="$(settled requested)"
  [ "$now" = ACTIVE ] ||
    fail "the request is $now; gcloud compute tpus queued-resources describe $name ${place[*]} says why"
  echo "tpu: $name is ACTIVE"
}

on() {
  local worker="$1" command="$2"
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$worker" --command="$command"
}

# A shell of its own, whose trap removes the archive. "installed" is there only while the copy is complete.
setup() (
  commit="$(commit)"
  archive="${TMPDIR:-/tmp}/imgcap_jax-$$.tar.gz"
  trap 'run rm -f "$archive"' EXIT
  run git archive --format=tar.gz --output="$archive" "$commit"
  run gcloud compute tpus tpu-vm scp "$archive" "$name:imgcap_jax.tar.gz" "${place[@]}" --worker=all
  on all "$(printf '%s && ' "mkdir -p imgcap_jax" "rm -f imgcap_jax/installed" \
    "tar -xzf imgcap_jax.tar.gz -C imgcap_jax")imgcap_jax/scripts/tpu/host.sh install $commit"
)

commit() {
  git rev-parse --verify --quiet "${COMMIT:-HEAD}^{commit}" || fail "there is no commit ${COMMIT:-HEAD} in this clone"
}

# "training" or "ended CODE"; "ended" if setup has not ended there.
status() {
  on "$1" "if [ -e imgcap_jax/installed ]; then imgcap_jax/scripts/tpu/host.sh status; else echo ended; fi"
}

# Stops training on all hosts. Prints "not installed" for each host that does not have the commit.
halt() {
  local stopped="imgcap_jax/scripts/tpu/host.sh stop || [ ! -e imgcap_jax/installed ]"
  on all "{ $stopped; } && { grep -qsx $1 imgcap_jax/installed || echo not installed; }"
}

launch() {
  local words
  [ $# -gt 0 ] || fail "launch needs an experiment, such as: launch coco --run gs://BUCKET/runs/coco"
  words="$(printf ' %q' launch "$@")"
  [ -z "${DATA:-}" ] || words="$words$(printf ' --data.data-dir %q' "$DATA")"
  on all "imgcap_jax/scripts/tpu/host.sh$words"
}

resume() {
  [ $# -gt 0 ] || fail "resume needs the arguments of launch"
  local now hosts commit
  commit="$(commit)"
  if [ -n "$dry" ]; then
    describe
    echo "# again, while it is in the queue or is being taken away"
    echo "# if it was taken away (without the first command if there is none):"
    delete
    create
    setup
    echo "# if it is ACTIVE:"
    status all
    echo "# and unless all hosts are training:"
    halt "$commit"
    echo "# and if a host does not have this commit:"
    setup
    echo "# unless all hosts are training:"
    launch "$@"
    return
  fi
  now="$(state)"
  now="$(settled "$now")"
  case "$now" in
    ACTIVE)
      hosts="$(status all)"
      if [[ "$hosts" == *training* && "$hosts" != *ended* ]]; then
        echo "tpu: all hosts of $name are training"
        return
      fi
      hosts="$(halt "$commit")" # the others wait for the one that has ended
      [[ "$hosts" != *"not installed"* ]] || setup
      ;;
    SUSPENDED | FAILED)
      echo "tpu: $name is $now, and is made again"
      delete
      create
      setup
      ;;
    MISSING)
      create
      setup
      ;;
  esac
  launch "$@"
}

# 143 and 130: stopped by a signal, as when the TPU is taken away; gcloud can fail for a while, and while a TPU is taken
# away everything fails: resume is tried again. 137: killed, as when the memory of a host is full; 134 and 139: aborted
# or crashed, as when another host has gone. These are counted, and forgotten after 15 looks in a row at which all hosts
# were training: by then it has saved a checkpoint.
keep() {
  COMMIT="$(commit)"
  export COMMIT
  if [ -n "$dry" ]; then
    resume "$@"
    echo "# two minutes later:"
    status all
    echo "# and unless all hosts are training:"
    status 0
    return
  fi
  local now failures=0 crashes=0 healthy=0
  while true; do
    if ! scripts/tpu/tpu.sh resume "$@"; then # another process, because a condition turns off "set -e"
      failures=$((failures + 1))
      [ "$failures" -lt "${TRIES:-30}" ] || fail "$failures failures in a row"
      echo "tpu: resume has failed, and is tried again" >&2
      sleep "${PAUSE:-120}"
      continue
    fi
    failures=0
    sleep "${PAUSE:-120}"
    now="$(status all || true)"
    if [[ "$now" == *training* && "$now" != *ended* ]]; then
      healthy=$((healthy + 1))
      [ "$healthy" -lt 15 ] || crashes=0
      continue
    fi
    healthy=0
    now="$(status 0 || true)"
    case "$now" in
      "ended 0") break ;;
      "ended 134" | "ended 137" | "ended 139" | training) # training: another host has ended
        crashes=$((crashes + 1))
        [ "$crashes" -lt "${TRIES:-30}" ] ||
          fail "training has ${now/training/ended on a host}, $crashes failures in a row"
        ;;
      "ended 143" | "ended 130" | "ended " | ended | "") ;;
      *) fail "training has $now; scripts/tpu/tpu.sh watch shows why" ;;
    esac
  done
  echo "tpu: training has finished; scripts/tpu/tpu.sh delete ends the costs"
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

case "$action" in
  create | setup | launch | watch | stop | resume | keep | delete) ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "scripts/tpu/tpu.sh"
    exit 2
    ;;
esac
[ -n "${ZONE:-}" ] || fail "set ZONE, such as ZONE=us-west4-a"
[ -n "$dry" ] || command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
place=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || place+=(--project="$PROJECT")
case "$action" in
  watch) on 0 "tail -n 40 -F imgcap_jax/train.log" ;;
  stop) on all "imgcap_jax/scripts/tpu/host.sh stop" ;;
  *) "$action" "$@" ;;
esac
