#!/usr/bin/env bash
# Creates .venv and installs imgcap_jax into it, with the tested versions of its dependencies. The other scripts call it.
#   scripts/setup.sh [EXTRAS]      e.g. scripts/setup.sh dev,java
# PYTHON chooses the interpreter, VENV another folder than .venv. NEWEST=1 installs the newest versions instead of those in
# constraints.txt: PYTHON=python3.13 VENV=.venv-newest NEWEST=1 scripts/setup.sh dev
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"

python="${PYTHON:-}"
if [ -z "$python" ]; then
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python="$candidate"
      break
    fi
  done
fi
if [ -z "$python" ]; then
  echo "setup: no Python 3.11 or newer found; install one, or set PYTHON: PYTHON=/path/to/python3.12 $0" >&2
  exit 2
fi

venv="${VENV:-.venv}"
versions=(-c constraints.txt)
[ -z "${NEWEST:-}" ] || versions=(--upgrade --upgrade-strategy eager)
if [ ! -x "$venv/bin/python" ]; then
  echo "setup: creating $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
target=".${extras:+[$extras]}"
# Run pip only if the extras or one of these files have changed since the last installation. The newest versions change
# without them.
wanted="$target ${versions[*]} $(cat setup.cfg pyproject.toml constraints.txt | sha256sum | cut -c1-16)"
if [ -n "${NEWEST:-}" ] || [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
  echo "setup: installing into $venv (a few minutes the first time)"
  quiet=--quiet
  [ ! -t 1 ] || quiet= # a terminal shows the progress of pip
  "$venv/bin/pip" install $quiet --disable-pip-version-check "${versions[@]}" -e "$target"
  # jax2onnx asks for an older Orbax than imgcap_jax, and does not use it.
  case ",$extras," in *,dev,*) "$venv/bin/pip" install $quiet --disable-pip-version-check --no-deps "jax2onnx>=0.17" ;; esac
  echo "$wanted" > "$venv/installed"
  echo "setup: installed in $SECONDS s"
fi
[ ! -t 1 ] || echo "setup: to use the command imgcap: source $venv/bin/activate"
