#!/usr/bin/env bash
# One run after the other, one per line of standard input; a line holds the overrides of its run:
#   printf '%s\n' --config.loss.name=ipo --config.loss.name=simpo | launch/sweep.sh configs/hh_small.py runs/losses
# Each run works in its own directory, named by its overrides, so the same sweep again continues where it stopped.
set -eu
config=$1 runs=$2
while read -r -a overrides; do
  name=$(printf '%s' "${overrides[*]//--config./}" | tr -c 'A-Za-z0-9.=-' '_')
  "$(dirname "$0")/local.sh" --config="$config" --config.workdir="$runs/$name" "${overrides[@]}" </dev/null
done
