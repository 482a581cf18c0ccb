#!/usr/bin/env bash
# One process on this machine, on whatever devices jax finds. Arguments go to sera_jax.main unchanged:
#   launch/local.sh --config=configs/llama_dpo.py --config.workdir=runs/first
# The same command again continues a run that was stopped. PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "no interpreter at '$python': run make env, or set PYTHON" >&2; exit 1; }
exec "$python" -m sera_jax.main "$@"
