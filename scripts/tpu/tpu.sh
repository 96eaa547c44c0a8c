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
# --dry-run, anywhere, prints the commands and runs none. --help prints this.
#
# The settings are variables:
#   TPU_NAME  name (imgcap)            TPU_TYPE  accelerator type (v5litepod-8)     ZONE     zone (required)
#   RUNTIME   software version (chosen by the type)   SPOT=1  can be preempted, cheaper     PROJECT  default: gcloud's
#   DATA      folder of datasets, such as gs://BUCKET/datasets (default: on each host)
#   COMMIT    what setup installs (HEAD; keep: HEAD when it starts); EXPERIMENT is a name or file of this commit
#   PAUSE     seconds between two looks at the TPU (30; keep: 120)
#   TRIES     keep, and waiting for the TPU, end after this number of failures in a row (30)
# resume and keep need a run in gs://, because the disks of the hosts go with the TPU. A slice of several hosts needs one
# that all of them reach:
#   ZONE=us-west4-a SPOT=1 TPU_TYPE=v5litepod-16 scripts/tpu/tpu.sh launch coco --run gs://BUCKET/runs/coco
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

dry='' help=''
for argument in "$@"; do # each goes to the end, except for these
  shift
  case "$argument" in
    --dry-run) dry=1 ;;
    -h | --help) help=1 ;;
    *) set -- "$@" "$argument" ;;
  esac
done
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

# The software version of the type; fails if it has none.
runtime() {
  case "${type%-*}" in
    tpu7x) echo v2-alpha-tpu7-ubuntu2404 ;;
    v6e) echo v2-alpha-tpuv6e ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v5litepod) echo v2-alpha-tpuv5-lite ;;
    v2 | v3 | v4) echo tpu-ubuntu2204-base ;;
    *) return 1 ;;
  esac
}

check_type() {
  [[ "$type" != v5e-* ]] || fail "TPU_TYPE=$type: v5litepod-${type#v5e-} is its name"
  if ! [[ "$type" =~ ^[a-z0-9]+-[1-9][0-9]*$ ]] || { [ -z "${RUNTIME:-}" ] && ! runtime >/dev/null; }; then
    fail "TPU_TYPE=$type is not known; use v2-N, v3-N, v4-N, v5litepod-N, v5p-N, v6e-N or tpu7x-N, or set RUNTIME too"
  fi
}

# Hosts have 4 or 8 chips. N of v5litepod-N and v6e-N are chips, of which one host has up to 8; of the others it is cores,
# of which one host has 8.
several_hosts() {
  [ "${type##*-}" -gt 8 ]
}

# Checks the arguments of launch, keep and resume. The hosts have only experiments of the commit.
check_training() {
  local experiment="${1:-}" names run='' before='' word commit
  [ $# -gt 0 ] || fail "$action needs an experiment, such as: $action coco --run gs://BUCKET/runs/coco"
  commit="$(commit)"
  names="$(git ls-tree --name-only "$commit" experiments/ | sed -n 's|^experiments/\([^_].*\)\.py$|\1|p')"
  if [[ "$experiment" == *.py ]]; then
    git cat-file -e "$commit:$experiment" 2>/dev/null ||
      fail "$experiment is not in commit ${commit::9}; give its path from the root of the clone, and commit it"
  elif [[ $'\n'"$names"$'\n' != *$'\n'"$experiment"$'\n'* ]]; then
    fail "no experiment '$experiment' in commit ${commit::9}; give a .py file of it, or one of ${names//$'\n'/, }"
  fi
  for word in "$@"; do
    [ "$before" != --run ] || run="$word"
    [[ "$word" != --run=* ]] || run="${word#--run=}"
    before="$word"
  done
  [[ "$run" != gs://?* ]] || return 0
  case "$action" in
    keep | resume) fail "$action needs --run gs://BUCKET/FOLDER: the disks of the hosts go with the TPU" ;;
    *) ! several_hosts || fail "$type has several hosts, which need a common run: --run gs://BUCKET/FOLDER" ;;
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
  words="$(printf ' %q' launch "$@")"
  [ -z "${DATA:-}" ] || words="$words$(printf ' --data.data-dir %q' "$DATA")"
  on all "imgcap_jax/scripts/tpu/host.sh$words"
  [ -n "$dry" ] || echo "next: scripts/tpu/tpu.sh watch"
}

resume() {
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

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/tpu/tpu.sh
}

if [ -n "$help" ]; then
  usage
  exit
fi
case "$action" in
  create | setup | watch | stop | delete) [ $# = 0 ] || fail "$action takes no arguments: $*" ;;
  launch | resume | keep) ;;
  *)
    usage
    [ -z "$action" ] || fail "there is no action $action"
    exit 2
    ;;
esac
case "$action" in create | launch | resume | keep) check_type ;; esac
case "$action" in launch | resume | keep) check_training "$@" ;; esac
[ -n "${ZONE:-}" ] || fail "set ZONE, such as ZONE=us-west4-a"
[ -n "$dry" ] || command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
place=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || place+=(--project="$PROJECT")
case "$action" in
  watch) on 0 "tail -n 40 -F imgcap_jax/train.log" ;;
  stop) on all "imgcap_jax/scripts/tpu/host.sh stop" ;;
  *) "$action" "$@" ;;
esac
