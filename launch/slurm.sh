#!/usr/bin/env bash
# On the GPUs of a SLURM cluster, a process for each. What stands before --config= goes to sbatch, the rest to
# sera_jax.main, both unchanged:
#   launch/slurm.sh --nodes=2 --gpus-per-node=8 --time=12:00:00 --config=configs/llama_dpo.py --config.workdir=runs/first
# Waits for the job and ends with its exit code. Five minutes before its time limit the job saves, and is queued again;
# so it is after any stop that saved (75), but for one by Ctrl-C here, and it is not where it was refused (2) or failed.
# Logs: logs/slurm-JOB.log and logs/slurm-JOB-process-0.log and so on, or in LOGS; a file system that all nodes see.
# The same command again goes on. PYTHON chooses the interpreter.
set -eu

if [ "${1:-}" = --within-the-job ]; then # as sbatch starts it: in the folder that it was called from
  logs=$2 python=$3
  shift 3
  # srun does not take it from sbatch
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  code=0
  # 75 of one process must not have the others killed while they save, whatever the cluster's default is
  srun --kill-on-bad-exit=0 --open-mode=append --output="$logs/slurm-$SLURM_JOB_ID-process-%t.log" \
    "$python" -m sera_jax.main "$@" || code=$?
  if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID" || true # refused after a stop by hand
  fi
  exit "$code"
fi

cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
logs=${LOGS:-logs}
options=()
gpus=
while [ $# -gt 0 ] && [[ $1 != --config=* ]]; do
  case $1 in --gpus-per-node=*) gpus=${1##*[=:]} ;; esac # a number, or KIND:NUMBER
  options+=("$1")
  shift
done
[ $# -gt 0 ] || { echo "give --config=FILE; what stands before it goes to sbatch" >&2; exit 2; }
[[ $gpus =~ ^[1-9][0-9]*$ ]] || { echo "give --gpus-per-node=N before --config=: a process is started for each" >&2; exit 2; }

mkdir -p "$logs"
submitted=$(mktemp)
set -m # a group of its own: a signal to that of this script is not for sbatch
sbatch --wait --parsable --requeue --open-mode=append --signal=TERM@300 --ntasks-per-node="$gpus" \
  --output="$logs/slurm-%j.log" "${options[@]}" \
  launch/slurm.sh --within-the-job "$logs" "$python" "$@" >"$submitted" &
waiting=$!
set +m
# shellcheck disable=SC2329 # by the trap
stop() {
  job=$(cut -d';' -f1 "$submitted")
  scontrol update JobId="$job" Requeue=0 || true
  scancel --state=PENDING "$job" || true
  scancel --state=RUNNING --signal=TERM "$job" || true
}
trap stop INT TERM
code=0
wait "$waiting" || code=$?
while kill -0 "$waiting" 2>/dev/null; do # a signal ended the waiting, not the job
  code=0
  wait "$waiting" || code=$?
done
job=$(cut -d';' -f1 "$submitted")
rm -f "$submitted"
echo "job ${job:-none} ended with $code; logs in $logs/" >&2
tail -n 2 "$logs/slurm-$job-process-0.log" >&2 2>/dev/null || true
exit "$code"
