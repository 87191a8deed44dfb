#!/usr/bin/env bash
# Memory after tensorstore.KvStore.Spec.to_json.
#
# Guess: the dictionary is freed when the caller drops it, so memory stays level however often it is asked.
# Behavior (tensorstore 0.1.86): the dictionary keeps a reference that nobody owns, and every call loses
# about 257 bytes for good; a garbage collection does not find them. Making the specification loses
# nothing. A program that saves often, for many arrays, grows without end.
# Output seen: "bytes lost a call: KvStore.Spec 0, to_json 257, Spec.to_json 643".
#
# Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "tensorstore==${TENSORSTORE_VERSION:-0.1.86}"
"$folder/venv/bin/python" - <<'PY'
import gc
import importlib.metadata
import pathlib
import resource

import tensorstore


def resident():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def lost(function, calls=50_000):
    for _ in range(2000):
        function()
    gc.collect()
    before = resident()
    for _ in range(calls):
        function()
    gc.collect()
    return (resident() - before) / calls


store = {"driver": "memory", "path": "abc/"}
spec = tensorstore.KvStore.Spec(store)
array = tensorstore.Spec({"driver": "zarr", "kvstore": store})
making = lost(lambda: tensorstore.KvStore.Spec(store))
writing = lost(spec.to_json)
print(
    f"tensorstore {importlib.metadata.version('tensorstore')}; bytes lost a call: KvStore.Spec {making:.0f}, "
    f"to_json {writing:.0f}, Spec.to_json {lost(array.to_json):.0f}"
)
assert making < 20, "this has changed"
assert writing > 100, "this has changed"
PY
