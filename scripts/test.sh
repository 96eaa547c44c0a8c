#!/usr/bin/env bash
# Sets up and passes the tests: ruff, mypy, pytest.
#   scripts/test.sh            within 10 minutes on 2 cores
#   scripts/test.sh --all      the slow tests too
# EXTRAS adds optional oracles, as in EXTRAS=java,torch scripts/test.sh (without them their tests skip).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh "dev${EXTRAS:+,$EXTRAS}"
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
mypy
if [ "${1:-}" = --all ]; then
  shift
  pytest "$@"
else
  pytest -m "not slow" "$@"
fi
