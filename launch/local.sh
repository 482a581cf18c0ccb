#!/usr/bin/env bash
# On this machine, on whatever devices jax finds. Arguments go to sera_jax.main unchanged:
#   launch/local.sh --config=configs/llama_dpo.py --config.workdir=runs/first
# With --processes=N as many processes run it together, each on its share of the GPUs (on a CPU, on the devices that
# XLA_FLAGS simulates), with a log each: logs/process-0.log and so on, or in LOGS. Ctrl-C stops all of them with
# everything saved; where one ends otherwise, the others end by themselves within half a minute.
# The same command again continues a run that was stopped. PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "no interpreter at '$python': run make env, or set PYTHON" >&2; exit 1; }

processes=1
arguments=()
for argument in "$@"; do
  case $argument in
    --processes=*) processes=${argument#*=} ;;
    *) arguments+=("$argument") ;;
  esac
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "--processes=$processes: give how many, 1 or more" >&2; exit 2; }
[ "$processes" -gt 1 ] || exec "$python" -m sera_jax.main "${arguments[@]}"

gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
share=$((gpus / processes))
if [ "$gpus" -gt 0 ] && [ $((share * processes)) -ne "$gpus" ]; then
  echo "--processes=$processes does not divide the $gpus GPUs of this machine" >&2
  exit 2
fi
logs=${LOGS:-logs}
mkdir -p "$logs"
port=${PORT:-$((20000 + RANDOM % 20000))}
children=()
trap 'kill -TERM "${children[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < processes; i++)); do
  if [ "$share" -gt 0 ]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * share)) $(((i + 1) * share - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  "$python" -m sera_jax.main "${arguments[@]}" \
    --coordinator_address="localhost:$port" --num_processes="$processes" --process_id="$i" \
    >"$logs/process-$i.log" 2>&1 &
  children+=($!)
done
echo "$processes processes; logs in $logs/" >&2

code=0
for child in "${children[@]}"; do
  ended=0
  wait "$child" || ended=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended the waiting, not the process
    ended=0
    wait "$child" || ended=$?
  done
  [ "$code" -ne 0 ] || code=$ended
done
tail -n 1 "$logs/process-0.log" >&2
exit "$code"
