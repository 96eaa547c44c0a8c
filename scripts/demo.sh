#!/usr/bin/env bash
# The main job on the embedded dataset: install, draw scenes, train from scratch, evaluate, caption, show.
#   scripts/demo.sh        5 to 8 minutes on 2 CPU cores after installation; run again, it goes on where it was
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
start=$SECONDS
export PATH="$PWD/.venv/bin:$PATH" TFDS_DATA_DIR="${TFDS_DATA_DIR:-$PWD/runs/datasets}"
run=runs/scenes_demo

imgcap data prepare scenes
imgcap train scenes_demo --run "$run"
imgcap evaluate "$run" --split test --page "$run/report.html"
imgcap evaluate "$run" --split test_compositional
echo "took $((SECONDS - start)) s after installation; open $run/report.html for ten unseen scenes with their captions"
