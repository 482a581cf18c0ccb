#!/usr/bin/env bash
# What launch/tpu_vm.sh has each worker do: start the run, unless it is at work, and follow it to its end. A connection
# that is lost leaves it at work. Arguments go to sera_jax.main unchanged; --stop alone has the run save and end.
# In .launch/: log, pid, code, arguments. PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "error: no interpreter at '$python' on $(hostname)" >&2; exit 2; }
mkdir -p .launch
is_at_work() { [ -s .launch/pid ] && kill -0 "$(cat .launch/pid)" 2>/dev/null; }

if [ "$*" = --stop ]; then
  if is_at_work; then kill -TERM "$(cat .launch/pid)"; fi
  exit 0
fi
arguments=$(printf '%q ' "$@")
if is_at_work && [ "$(cat .launch/arguments)" != "$arguments" ]; then
  echo "error: another command is at work on $(hostname): $(cat .launch/arguments)" >&2
  exit 2
fi
if ! is_at_work; then
  rm -f .launch/pid .launch/code
  printf '%s' "$arguments" >.launch/arguments
  : >.launch/log
  # shellcheck disable=SC2016 # expanded by the inner shell
  setsid bash -c '
    "$@" & echo $! >.launch/pid
    code=0; wait $! || code=$?
    echo "$code" >.launch/code' _ "$python" -m sera_jax.main "$@" </dev/null >.launch/log 2>&1 &
  until [ -s .launch/pid ]; do sleep 0.1; done
fi
tail -n +1 --pid="$(cat .launch/pid)" -f .launch/log
until [ -s .launch/code ]; do sleep 0.1; done
exit "$(cat .launch/code)"
