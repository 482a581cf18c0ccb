#!/usr/bin/env bash
# On this machine, on whatever devices jax finds. Arguments go to sera_jax.main unchanged:
#   launch/local.sh --config=configs/llama_dpo.py --config.workdir=runs/first
# With --processes=N as many processes run it together, each on its share of the GPUs (on a CPU, on the devices that
# XLA_FLAGS simulates), with a log each: logs/process-0.log and so on, or in LOGS. Ctrl-C stops all of them with
# everything saved; where one ends otherwise, the others end by themselves within half a minute, or are killed. One that
# gets nowhere for --silent_seconds (600; 0: however long) is named, and all are ended, with exit code 1.
# The same command again continues a run that was stopped. PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "no interpreter at '$python': run make env, or set PYTHON" >&2; exit 1; }

processes=1
silent_seconds=600
arguments=()
for argument in "$@"; do
  case $argument in
    --processes=*) processes=${argument#*=} ;;
    --silent_seconds=*) silent_seconds=${argument#*=} ;;
    *) arguments+=("$argument") ;;
  esac
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "--processes=$processes: give how many, 1 or more" >&2; exit 2; }
[[ $silent_seconds =~ ^[0-9]+$ ]] || { echo "--silent_seconds=$silent_seconds: give whole seconds" >&2; exit 2; }
[ "$processes" -gt 1 ] || exec "$python" -m sera_jax.main "${arguments[@]}"

gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
share=$((gpus / processes))
if [ "$gpus" -gt 0 ] && [ $((share * processes)) -ne "$gpus" ]; then
  echo "--processes=$processes does not divide the $gpus GPUs of this machine" >&2
  exit 2
fi
logs=${LOGS:-logs}
mkdir -p "$logs/progress"
rm -f "$logs"/progress/process-*.json
port=${PORT:-$((20000 + RANDOM % 20000))}
children=()
trap 'kill -TERM "${children[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < processes; i++)); do
  if [ "$share" -gt 0 ]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * share)) $(((i + 1) * share - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  "$python" -m sera_jax.main "${arguments[@]}" --progress_dir="$logs/progress" \
    --coordinator_address="localhost:$port" --num_processes="$processes" --process_id="$i" \
    >"$logs/process-$i.log" 2>&1 &
  children+=($!)
done
watch=
if [ "$silent_seconds" -gt 0 ]; then
  "$python" -m sera_jax.status "$logs" --watch --processes="$processes" --silent_seconds="$silent_seconds" &
  watch=$!
fi
echo "$processes processes; logs in $logs/" >&2

is_there() { kill -0 "$1" 2>/dev/null; }
codes=()   # of those that ended
kill_at=   # the second at which those that are left are killed
silent=0
while :; do
  left=()
  for ((i = 0; i < processes; i++)); do
    if is_there "${children[i]}"; then
      left+=("$i")
    elif [ -z "${codes[i]:-}" ]; then
      codes[i]=0
      wait "${children[i]}" 2>/dev/null || codes[i]=$?
      if [ "${codes[i]}" -ne 0 ] && [ "${codes[i]}" -ne 75 ] && [ -z "$kill_at" ]; then
        kill_at=$((SECONDS + 60))
      fi
    fi
  done
  [ "${#left[@]}" -gt 0 ] || break
  if [ -n "$watch" ] && ! is_there "$watch"; then
    code=0
    wait "$watch" || code=$?
    watch=
    if [ "$code" -eq 3 ]; then # it has said which one is silent
      echo "ending all; the same command goes on from what was saved" >&2
      silent=1
      kill -TERM "${children[@]}" 2>/dev/null || true
      kill_at=$((SECONDS + 30))
    fi
  fi
  if [ -n "$kill_at" ] && [ "$SECONDS" -ge "$kill_at" ]; then
    for i in "${left[@]}"; do
      echo "process $i has not ended with the others: killed" >&2
      kill -KILL "${children[i]}" 2>/dev/null || true
    done
  fi
  sleep 0.5 || true # which a signal may end
done
if [ -n "$watch" ]; then
  { kill "$watch" && wait "$watch"; } 2>/dev/null || true
fi
tail -n 2 "$logs/process-0.log" >&2
[ "$silent" -eq 0 ] || exit 1
for code in "${codes[@]}"; do
  [ "$code" -eq 0 ] || exit "$code"
done
