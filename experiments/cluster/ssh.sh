#!/usr/bin/env bash
# A command on several hosts that share this folder, one process each:
#   experiments/cluster/ssh.sh host0,host1 python -m experiments.digits --executor sharded
# Process 0 is on the first host, and has the terminal. PORT and the next one are open there.
set -euo pipefail
IFS=, read -ra hosts <<<"$1"
shift
start() { # process, options of ssh
  local settings="JAX_COORDINATOR_ADDRESS=${hosts[0]}:${PORT:-1234}"
  settings+=" JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$1"
  "${SSH:-ssh}" "$2" "${hosts[$1]}" "cd $(printf %q "$PWD") && env $settings $command"
}
command=$(printf '%q ' "$@")
for ((process = 1; process < ${#hosts[@]}; process++)); do
  start "$process" -n &
done
code=0
start 0 -tt || code=$?
wait
exit "$code"
