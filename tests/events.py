"""TensorBoard event files as tests read them."""

import struct

from tensorboardX.proto import event_pb2


def events(folder):
    """(tag, step, summary value) of a folder's event files, read by the published framing."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])  # then 4 bytes of checksum, the event, 4 bytes of checksum
            # protobuf makes its classes at run time, where a type checker does not see them
            event = event_pb2.Event.FromString(data[12 : 12 + length])  # pyright: ignore[reportAttributeAccessIssue]
            found += [(value.tag, event.step, value) for value in event.summary.value]
            data = data[16 + length :]
    return found
