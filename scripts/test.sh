#!/usr/bin/env bash
# Installs the package and runs all checks: ruff, mypy, lint-imports, pytest.
#   scripts/test.sh            all except the slow tests, 10 to 25 minutes on 2 cores
#   scripts/test.sh --all      includes the slow tests
# EXTRAS installs optional reference implementations, for example EXTRAS=java,torch scripts/test.sh. Tests that need a
# missing one are skipped. PYTHON, VENV and NEWEST are those of scripts/setup.sh. The files of tests are divided among
# WORKERS processes (default: 2).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh "dev${EXTRAS:+,$EXTRAS}"
bin="$(cd "${VENV:-.venv}" && pwd)/bin"
export PATH="$bin:$PATH"

ruff check .
ruff format --check .
mypy
lint-imports
parallel=(-n "${WORKERS:-2}" --dist loadfile)
if [ "${1:-}" = --all ]; then
  shift
  pytest "${parallel[@]}" "$@"
else
  pytest "${parallel[@]}" -m "not slow" "$@"
fi
