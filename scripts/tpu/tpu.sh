#!/usr/bin/env bash
# Trains on a Cloud TPU VM, or on a slice of several hosts, with gcloud (queued resources).
#   scripts/tpu/tpu.sh create                       asks for the TPU and waits until it is there
#   scripts/tpu/tpu.sh setup                        copies this clone (what is committed) to all hosts and installs it
#   scripts/tpu/tpu.sh launch EXPERIMENT [OPTIONS]  starts imgcap train on all hosts, in the background
#   scripts/tpu/tpu.sh watch                        shows the output of the first host
#   scripts/tpu/tpu.sh stop                         SIGTERM: training saves a checkpoint and ends
#   scripts/tpu/tpu.sh resume EXPERIMENT [OPTIONS]  a TPU that was taken away is made again; training goes on
#   scripts/tpu/tpu.sh keep EXPERIMENT [OPTIONS]    resume, every two minutes until training has finished
#   scripts/tpu/tpu.sh delete                       deletes the TPU; runs in gs:// remain
# --dry-run as the first argument prints the commands and runs none.
#
# The settings are variables:
#   TPU_NAME  name (imgcap)            TPU_TYPE  accelerator type (v5litepod-8)     ZONE     zone (required)
#   RUNTIME   software version (chosen by the type)   SPOT=1  can be preempted, cheaper     PROJECT  default: gcloud's
#   DATA      folder of datasets, such as gs://BUCKET/datasets (default: on each host)
#   PAUSE     seconds between two looks at the TPU (30; keep: 120)
#   TRIES     keep ends after this number of failures in a row (30)
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

# The state of the request: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, ...; MISSING if there is none.
state() {
  local found errors
  errors="$(mktemp)"
  if found="$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)' 2>"$errors")"; then
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

create() {
  local spot=()
  [ -z "${SPOT:-}" ] || spot=(--spot)
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
    --accelerator-type="$type" --runtime-version="${RUNTIME:-$(runtime)}" "${spot[@]}"
  if [ -n "$dry" ]; then
    run gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)'
    return
  fi
  local now
  now="$(state)"
  while [ "$now" != ACTIVE ]; do
    case "$now" in
      FAILED | SUSPENDED | MISSING)
        fail "the request is $now; gcloud compute tpus queued-resources describe $name ${place[*]} says why"
        ;;
    esac
    echo "tpu: $name is $now"
    sleep "${PAUSE:-30}"
    now="$(state)"
  done
  echo "tpu: $name is ACTIVE"
}

on() {
  local worker="$1" command="$2"
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$worker" --command="$command"
}

setup() {
  local archive="${TMPDIR:-/tmp}/imgcap_jax-$$.tar.gz"
  run git archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:imgcap_jax.tar.gz" "${place[@]}" --worker=all
  run rm -f "$archive"
  on all "mkdir -p imgcap_jax && tar -xzf imgcap_jax.tar.gz -C imgcap_jax && imgcap_jax/scripts/tpu/host.sh install"
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
  if [ -n "$dry" ]; then
    echo "# if it was taken away:"
    delete
    create
    setup
    echo "# unless all hosts are training:"
    on all "imgcap_jax/scripts/tpu/host.sh stop"
    launch "$@"
    return
  fi
  local now hosts
  now="$(state)"
  while [ "$now" = SUSPENDING ]; do
    sleep "${PAUSE:-30}"
    now="$(state)"
  done
  case "$now" in
    ACTIVE)
      hosts="$(on all "imgcap_jax/scripts/tpu/host.sh status")"
      if [[ "$hosts" != *ended* ]]; then
        echo "tpu: all hosts of $name are training"
        return
      fi
      on all "imgcap_jax/scripts/tpu/host.sh stop" # the others wait for the one that has ended
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
    *) fail "$name is $now; try again when it is ACTIVE" ;;
  esac
  launch "$@"
}

# 143, 137 and 130: killed by a signal, as when the TPU is taken away; 134 and 139: aborted or crashed, as when another
# host has gone. gcloud can fail for a while, and while a TPU is taken away everything fails: resume is tried again.
keep() {
  if [ -n "$dry" ]; then
    resume "$@"
    return
  fi
  local now failures=0
  while true; do
    if ! scripts/tpu/tpu.sh resume "$@"; then # another process, because a condition turns off "set -e"
      failures=$((failures + 1))
      [ "$failures" -lt "${TRIES:-30}" ] || fail "$failures failures in a row"
      echo "tpu: resume has failed, and is tried again" >&2
      sleep "${PAUSE:-120}"
      continue
    fi
    sleep "${PAUSE:-120}"
    now="$(on 0 "imgcap_jax/scripts/tpu/host.sh status" || true)"
    case "$now" in
      "ended 0") break ;;
      training) failures=0 ;;
      "ended 134" | "ended 139")
        failures=$((failures + 1))
        [ "$failures" -lt "${TRIES:-30}" ] || fail "training has $now, $failures failures in a row"
        ;;
      "ended 143" | "ended 137" | "ended 130" | "ended " | ended | "") ;;
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
