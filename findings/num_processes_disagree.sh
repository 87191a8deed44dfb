#!/usr/bin/env bash
# Two processes that disagree about how many there are.
#
# Guess: the one that counts three waits for the third until its time-out, as for a process that never
# comes, or the coordinator, which counts two, refuses it.
# Behavior (jax 0.10.1): both start at once, and both see two devices of two processes; the number given
# to any process but 0 counts for nothing. So a mistake in a launch script is not noticed, and whoever
# computes the rows of a batch from that number trains on the wrong ones.
# Output seen (jax 0.10.1): "started as one of 2: 2 devices, 2 processes" and "started as one of 3: 2
# devices, 2 processes".
#
# Fails when that changes. `jaxnets.init_distributed` compares the numbers before JAX starts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==${JAX_VERSION:-0.10.1}"
cat > "$folder/process.py" <<'PYTHON'
import sys

import jax

port, number, count = map(int, sys.argv[1:])
jax.distributed.initialize(f"localhost:{port}", count, number, initialization_timeout=60)
print(f"started as one of {count}: {jax.device_count()} devices, {jax.process_count()} processes")
PYTHON
export JAX_PLATFORMS=cpu
port=$("$folder/env/bin/python" -c 'import socket
with socket.socket() as probe:
    probe.bind(("localhost", 0))
    print(probe.getsockname()[1])')
"$folder/env/bin/python" "$folder/process.py" "$port" 1 3 > "$folder/second" 2> "$folder/errors" &
"$folder/env/bin/python" "$folder/process.py" "$port" 0 2 2>> "$folder/errors" | grep started | tee "$folder/first"
wait
grep started "$folder/second" | tee -a "$folder/first"
[ "$(grep -c ': 2 devices, ' "$folder/first")" = 2 ] || { echo "this has changed"; exit 1; }
