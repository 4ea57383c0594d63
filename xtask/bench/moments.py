"""How long a checkpoint and a failover take, after so much was dirtied.

Over a control socket that is open already. QEMU's checkpoint is timed between `stop` and `cont`,
without these two; brep's is the command from its begin to the commit, the drain included.
"""

import socket
import struct
import time

import brep_model
import contenders
import loads

DIRTY_MIB = [0, 64, 512]


def measure(results, t, mib, base, number):
    """One round: each pair is started, dirtied and cut, dirtied and failed over."""
    pairs = [(contenders.BrepPair(t, "sync"), brep), (contenders.QemuPair(t), qemu)]
    for pair, times in pairs if number % 2 == 0 else reversed(pairs):
        pair.start(base)
        # The first epoch of a pair has no older buffer that it could take.
        loads.dirty(pair, mib)
        pair.checkpoint()
        loads.dirty(pair, mib)
        for name, ms in times(pair, mib).items():
            results.setdefault(name, {}).setdefault(str(mib), {}) \
                .setdefault(pair.title, []).append(ms)
        pair.stop()


def brep(pair, mib):
    checkpoint_ms = milliseconds(pair.checkpoint)
    loads.dirty(pair, mib)
    pair.lose_primary()
    started, started_s = time.monotonic(), time.time()
    pair.failover()
    first_read(*pair.served_uri())
    read_ms = since(started)
    # By the time that the event tells: the read took place meanwhile.
    merged_ms = (pair.wait_merged() - started_s) * 1000
    return {"checkpoint": checkpoint_ms, "failover until the first read": read_ms,
            "failover until merged": merged_ms}


def qemu(pair, mib):
    pair.primary.hold()
    checkpoint_ms = milliseconds(
        lambda: (pair.secondary.do_checkpoint(), pair.primary.do_checkpoint()))
    pair.primary.release()
    loads.dirty(pair, mib)
    pair.lose_primary()
    started = time.monotonic()
    pair.failover()
    pair.wait_merged()
    return {"checkpoint": checkpoint_ms, "failover until merged": since(started)}


def milliseconds(action):
    started = time.monotonic()
    action()
    return since(started)


def since(started):
    return (time.monotonic() - started) * 1000


def first_read(address, export):
    """Connects like a new guest, and reads a block."""
    with socket.create_connection(address) as connection:
        # As NBD clients do: else its second small message waits for an acknowledgement.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        brep_model.negotiate(connection, export)
        connection.sendall(brep_model.request(brep_model.READ, 1, 0, brep_model.BLOCK))
        _, error, _ = struct.unpack(">IIQ", brep_model.receive(connection, 16))
        if error:
            raise OSError(f"the first read failed: {error}")
        brep_model.receive(connection, brep_model.BLOCK)
