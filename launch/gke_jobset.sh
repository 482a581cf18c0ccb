#!/usr/bin/env bash
# On slices of TPUs of a GKE cluster, as a JobSet: a pod for each host. What follows from --config= on goes to
# sera_jax.main unchanged:
#   launch/gke_jobset.sh first --accelerator=tpu-v5-lite-podslice --topology=4x4 --hosts=4 --chips=4 --image=IMAGE \
#     --claim=CLAIM --config=configs/llama_dpo.py --config.workdir=runs/first
# --slices=N (1): of N slices each holds whole copies, so --config.mesh.data is N or a multiple of it. --hosts: of a
# slice. --chips: of a host. --image: has this repository in --directory=DIR (/sera_jax) and its requirements with jax[tpu].
# --claim: a volume claim that all pods may write, mounted as runs/ there. --max_restarts=N (20). --namespace=NAME.
# Waits, and ends with the exit code of the job. Ctrl-C deletes the job set: all is saved, and the exit code is 75. If
# this command ends otherwise the job set stays, and the same command follows it, or goes on where it has ended.
# Logs of the last start: logs/POD.log, or in LOGS.
set -eu
cd "$(dirname "$0")/.."

{ [ $# -gt 0 ] && [[ $1 =~ ^[a-z0-9]([-a-z0-9]*[a-z0-9])?$ ]]; } || {
  echo "give the job set's name first: small letters, digits, -" >&2
  exit 2
}
name=$1
shift

replace() { # TEXT FROM TO, all as they are: $replaced
  local rest=$1
  replaced=
  while [[ $rest == *"$2"* ]]; do
    replaced+=${rest%%"$2"*}$3
    rest=${rest#*"$2"}
  done
  replaced+=$rest
}
fill() { # FIELD VALUE: in the manifest
  [[ $2 =~ ^[A-Za-z0-9./:@_-]+$ ]] || { echo "--$1='$2': letters, digits and . / : @ _ - alone" >&2; exit 2; }
  replace "$manifest" "{$1}" "$2"
  manifest=$replaced
}
quote() { # a string of JSON in which Kubernetes expands nothing: $replaced
  replace "$1" \\ \\\\
  replace "$replaced" '"' '\"'
  replace "$replaced" $'\n' '\n'
  replace "$replaced" $'\t' '\t'
  replace "$replaced" $'\r' '\r'
  replace "$replaced" \$ \$\$
  replaced=\"$replaced\"
}

manifest=$(cat launch/jobset.yaml)
namespace=()
fill name "$name"
while [ $# -gt 0 ] && [[ $1 != --config=* ]]; do
  case $1 in
    --namespace=*) namespace=("$1") ;;
    --accelerator=* | --topology=* | --slices=* | --hosts=* | --chips=* | --image=* | --claim=* | --directory=* | --max_restarts=*)
      option=${1%%=*}
      fill "${option#--}" "${1#*=}"
      ;;
    *)
      echo "$1 is not understood before --config= (the head of launch/gke_jobset.sh has what is)" >&2
      exit 2
      ;;
  esac
  shift
done
[ $# -gt 0 ] || { echo "give --config=FILE last, before its overrides" >&2; exit 2; }
fill directory /sera_jax # where none was given
fill max_restarts 20
fill slices 1
if [[ $manifest =~ \{(accelerator|topology|hosts|chips|image|claim)\} ]]; then
  echo "give --${BASH_REMATCH[1]}=... before --config=" >&2
  exit 2
fi
list=
for argument in "$@"; do
  quote "$argument"
  list+=${list:+, }$replaced
done
replace "$manifest" "{args}" "[$list]"
manifest=$replaced

kube() { kubectl ${namespace[@]+"${namespace[@]}"} "$@"; }
ended() { # Completed, Failed, or nothing while it is at work
  kube get jobset "$name" --ignore-not-found \
    -o 'jsonpath={.status.conditions[?(@.status=="True")].type}' | grep -owE 'Completed|Failed' || true
}
there=$(kube get jobset "$name" --ignore-not-found -o name)
if [ -n "$there" ] && [ -n "$(ended)" ]; then
  kube delete jobset "$name" --cascade=foreground >&2
  there=
fi
if [ -n "$there" ]; then
  echo "$name is at work already: following it as it was started" >&2
else
  kube create -f - <<<"$manifest" >&2
fi
trap 'echo "stopping ..." >&2; kube delete jobset "$name" --cascade=foreground >&2; exit 75' INT TERM

how=
until [ -n "$how" ]; do
  sleep "${POLL_SECONDS:-10}"
  how=$(ended)
done
logs=${LOGS:-logs}
mkdir -p "$logs"
label=jobset.sigs.k8s.io/jobset-name=$name
for pod in $(kube get pods -l "$label" -o 'jsonpath={.items[*].metadata.name}'); do
  kube logs "$pod" >"$logs/$pod.log" 2>&1 || true
done
codes=$(kube get pods -l "$label" -o 'jsonpath={.items[*].status.containerStatuses[0].state.terminated.exitCode}')
echo "$name: $how; exit codes of its pods: ${codes:-unknown}; logs in $logs/" >&2
[ "$how" != Completed ] || exit 0
[[ " $codes " != *" 2 "* ]] || exit 2
for code in $codes; do
  [ "$code" -eq 0 ] || exit "$code"
done
exit 1
