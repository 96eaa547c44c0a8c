#!/usr/bin/env bash
# Installs the package and runs all checks: ruff, mypy, lint-imports, pytest.
#   scripts/test.sh            all except the slow tests, 10 to 20 minutes on 2 cores
#   scripts/test.sh --all      includes the slow tests
# EXTRAS installs optional reference implementations, for example EXTRAS=java,torch scripts/test.sh. Tests that need a
# missing one are skipped. PYTHON, VENV and NEWEST are those of scripts/setup.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh "dev${EXTRAS:+,$EXTRAS}"
bin="$(cd "${VENV:-.venv}" && pwd)/bin"
export PATH="$bin:$PATH"

ruff check .
ruff format --check .
mypy
lint-imports
if [ "${1:-}" = --all ]; then
  shift
  pytest "$@"
else
  pytest -m "not slow" "$@"
fi
