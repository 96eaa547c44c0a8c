#!/usr/bin/env bash
# The demo on the built-in dataset of drawn scenes: installs, draws the scenes, trains from scratch, evaluates, and writes
# a page with curves, scores and captions.
#   scripts/demo.sh        4 to 10 minutes on 2 CPU cores after installation; a second run continues an interrupted one
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
start=$SECONDS
bin="$(cd "${VENV:-.venv}" && pwd)/bin"
export PATH="$bin:$PATH" TFDS_DATA_DIR="${TFDS_DATA_DIR:-$PWD/runs/datasets}"
run=runs/scenes_demo

imgcap data prepare scenes
imgcap train scenes_demo --run "$run"
imgcap evaluate "$run" --split test
imgcap evaluate "$run" --split test_compositional
imgcap report "$run" --split test --output "$run/report.html"
echo "finished in $((SECONDS - start)) s after installation"
echo "open $run/report.html: curves, scores, and scenes of the test split with captions and attention"
echo "to go on: source ${VENV:-.venv}/bin/activate; export TFDS_DATA_DIR=$TFDS_DATA_DIR"
