"""A reader of TensorBoard event files."""

import pytest


def events(folder):
    """Return {tag: [(step, kind, value)]} of the event files in a folder."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    values = {}
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                entry = event.step, kind, getattr(value, kind)
                values.setdefault(value.tag, []).append(entry)
    return values
