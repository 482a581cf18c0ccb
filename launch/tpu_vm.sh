#!/usr/bin/env bash
# On all workers of a TPU VM slice, by gcloud. What stands between the slice's name and --config= goes to gcloud, the
# rest to sera_jax.main, unchanged:
#   launch/tpu_vm.sh my-slice --zone=us-west4-a --copy --config=configs/llama_dpo.py --config.workdir=/mnt/bucket/first
# --copy puts the files of this checkout that git knows on each worker first; --directory=DIR says where they lie there
# (the name of this folder), --python=PATH with which interpreter (.venv/bin/python). The work directory must be one
# that all workers see. A log each: logs/worker-0.log and so on, or in LOGS. Ctrl-C stops the run with everything saved;
# a lost connection leaves it at work, and the same command then follows it, or goes on where it has ended. The exit
# code is that of the first worker that has one.
set -eu
cd "$(dirname "$0")/.."

{ [ $# -gt 0 ] && [[ $1 != -* ]]; } || { echo "give the slice's name first, then --zone=ZONE" >&2; exit 2; }
name=$1
shift
directory=$(basename "$PWD")
python=.venv/bin/python
copy=
where=()   # for every command of gcloud
options=() # for ssh and scp
while [ $# -gt 0 ] && [[ $1 != --config=* ]]; do
  case $1 in
    --copy) copy=1 ;;
    --directory=*) directory=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --zone=* | --project=*) where+=("$1") ;;
    *) options+=("$1") ;;
  esac
  shift
done
[ $# -gt 0 ] || { echo "give --config=FILE; what stands before it goes to gcloud" >&2; exit 2; }
[ "${#where[@]}" -gt 0 ] || { echo "give --zone=ZONE before --config=" >&2; exit 2; }

# one endpoint for each worker and network
read -r endpoints networks <<<"$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" \
  --format='value(networkEndpoints.len(),networkConfigs.len())')"
[[ ${endpoints:-} =~ ^[1-9][0-9]*$ ]] || { echo "gcloud describes no workers of $name" >&2; exit 2; }
[ "${networks:-0}" -gt 1 ] || networks=1
workers=$((endpoints / networks))
logs=${LOGS:-logs}
mkdir -p "$logs"

# One gcloud a worker, not --worker=all: it would want the key in an ssh-agent, and write all logs into one.
tpu() {
  local verb=$1 worker=$2
  shift 2
  gcloud compute tpus tpu-vm "$verb" "$@" --worker="$worker" "${where[@]}" ${options[@]+"${options[@]}"} </dev/null
}
on_all() { # COMMAND SUFFIX: a log for each worker; the first exit code that is not 0
  local pids=() code=0 ended i pid
  set -m # groups of their own: Ctrl-C reaches this script alone
  for ((i = 0; i < workers; i++)); do
    tpu ssh "$i" "$name" --command="$1" >"$logs/worker-$i$2.log" 2>&1 &
    pids+=($!)
  done
  set +m
  for pid in "${pids[@]}"; do
    ended=0
    wait "$pid" || ended=$?
    while kill -0 "$pid" 2>/dev/null; do # a signal ended the waiting, not the run
      ended=0
      wait "$pid" || ended=$?
    done
    [ "$code" -ne 0 ] || code=$ended
  done
  return "$code"
}

there=$(printf '%q' "$directory")
if [ -n "$copy" ]; then
  packed=$(mktemp)
  git ls-files -z | tar --null -czf "$packed" -T -
  for ((i = 0; i < workers; i++)); do
    tpu scp "$i" "$packed" "$name:.launch.tar.gz" >"$logs/worker-$i-copy.log" 2>&1 || {
      tail -n 1 "$logs/worker-$i-copy.log" >&2
      exit 2
    }
  done
  rm -f "$packed"
  on_all "mkdir -p $there && tar -xzf .launch.tar.gz -C $there" -copy
fi

run="cd $there && PYTHON=$(printf '%q' "$python") launch/worker.sh"
trap 'echo "stopping at the next safe point ..." >&2; on_all "$run --stop" -stop || true' INT TERM
echo "$workers workers; logs in $logs/" >&2
code=0
on_all "$run $(printf '%q ' "$@")" "" || code=$?
tail -n 2 "$logs/worker-0.log" >&2
exit "$code"
