"""TensorBoard's event files, read back."""

import pytest


def events(folder):
    """Read event files back: {tag: [(step, kind, value)]}, by the field numbers of the format."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                entry = event.step, kind, getattr(value, kind)
                found.setdefault(value.tag, []).append(entry)
    return found
