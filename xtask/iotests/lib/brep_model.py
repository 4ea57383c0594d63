"""Guests that write numbered blocks, and a model of what a disk may then hold.

Every write carries its own number. The model knows when each was submitted and when it was
answered, so it can say of an image, taken at any moment, whether it is the disk after some of the
writes in an order that the guests could have seen.
"""

import random
import socket
import struct
import threading
import time

from brep_iotest import Failed

BLOCK = 4096
NEVER = float("inf")

# Commands of the NBD protocol.
READ, WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6


class Write:
    """Blocks `first` to `end` were given this write's number, or zeroes."""

    def __init__(self, number, first, end, zero):
        self.number, self.first, self.end, self.zero = number, first, end, zero
        self.submitted = time.monotonic()
        # After this moment it changes nothing any more.
        self.over = NEVER
        self.acknowledged = False

    def __repr__(self):
        return (f"write {self.number} of blocks {self.first} to {self.end} "
                f"(zero: {self.zero}, acknowledged: {self.acknowledged})")

    def done(self):
        self.over, self.acknowledged = time.monotonic(), True


class Model:
    """The writes to one disk of `size` bytes that began as zeroes, or as `start`."""

    def __init__(self, size, start=None):
        self.size = size
        self.start = start or bytes(size)
        self.lock = threading.Lock()
        self.writes = []
        self.by_block = {}

    def begin(self, first, end, zero=False):
        with self.lock:
            write = Write(len(self.writes) + 1, first, end, zero)
            self.writes.append(write)
            for block in range(first, end):
                self.by_block.setdefault(block, []).append(write)
        return write

    def server_died(self):
        """What was not answered by now has happened by now, or never will."""
        now = time.monotonic()
        with self.lock:
            for write in self.writes:
                write.over = min(write.over, now)

    def check(self, image, since, until, what, whole=False):
        """Fails unless `image` is a crash-consistent state of the disk.

        Writes that were acknowledged before `since` are in it, none that was submitted after
        `until` is, and neither is a write without those that were acknowledged before it was
        submitted. With `whole`, each acknowledged write is there as a whole or not at all.
        """
        if len(image) != self.size:
            raise Failed(f"{what}: {len(image)} bytes, expected {self.size}")
        shown = {}
        for block in range(self.size // BLOCK):
            data = image[block * BLOCK:(block + 1) * BLOCK]
            shown[block] = self._candidates(block, data, until, what)
        # All that was acknowledged before any write that is there was submitted is there too.
        horizon = max([since] + [w.submitted for ws in shown.values() for w in ws
                                 if w and len(ws) == 1])
        for block, candidates in shown.items():
            if not any(self._may_show(block, w, horizon) for w in candidates):
                raise Failed(f"{what}: block {block} shows {candidates}, too old")
        if whole:
            self._check_whole(shown, what)

    def _candidates(self, block, data, until, what):
        """The writes that this block may show; None stands for the start."""
        writes = [w for w in self.by_block.get(block, []) if w.submitted <= until]
        found = [None] if data == self.start[block * BLOCK:(block + 1) * BLOCK] else []
        if not any(data):
            found += [w for w in writes if w.zero]
        else:
            found += [w for w in writes if not w.zero and data == content(w.number)]
        if not found:
            raise Failed(f"{what}: block {block} holds {data[:16].hex()}, which nobody wrote there")
        return found

    def _may_show(self, block, write, horizon):
        over = write.over if write else -NEVER
        return not any(w.acknowledged and w.submitted > over and w.over < horizon
                       for w in self.by_block.get(block, []))

    def _check_whole(self, shown, what):
        for candidates in shown.values():
            write = candidates[0]
            # What was never answered may have been torn when the server was killed.
            if len(candidates) > 1 or not write or not write.acknowledged:
                continue
            for block in range(write.first, write.end):
                newest = max(w.over if w else -NEVER for w in shown[block])
                if newest < write.submitted:
                    raise Failed(f"{what}: {write} is there in part: block {block}")


def content(number):
    return struct.pack(">Q", number) * (BLOCK // 8)


class Guest:
    """One connection that writes at random until it is told to stop; connects again and again."""

    def __init__(self, path, export, model, seed, depth=4):
        self.path, self.export, self.model, self.depth = str(path), export, model, depth
        self.rng = random.Random(seed)
        self.error = None
        self.slowest_s = 0
        self.acknowledged = 0
        # The time during which nobody can answer does not count as waiting.
        self.excused_until = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self):
        """Ends it after the requests in flight."""
        self._stop.set()
        self._thread.join(30)
        if self._thread.is_alive():
            raise Failed("a guest's requests do not end")
        if self.error:
            raise Failed(self.error)

    def excuse(self, seconds):
        self.excused_until = time.monotonic() + seconds

    def _run(self):
        while not self._stop.is_set():
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.settimeout(20)
                    connection.connect(self.path)
                    negotiate(connection, self.export)
                    while not self._stop.is_set():
                        self._burst(connection)
            except socket.timeout:
                self.error = "a request was not answered within 20 s"
                return
            except OSError:
                # Nobody is there just now.
                self._stop.wait(0.02)

    def _burst(self, connection):
        """Several requests at once, then all their answers."""
        flying = {}
        for cookie in range(self.rng.randint(1, self.depth)):
            blocks = self.model.size // BLOCK
            # Most of them fight for the first blocks.
            first = self.rng.randrange(min(64, blocks) if self.rng.random() < 0.7 else blocks)
            end = min(blocks, first + self.rng.choice([1, 1, 2, 5, 40]))
            kind = self.rng.choice([WRITE] * 8 + [FLUSH, TRIM, WRITE_ZEROES])
            if kind == FLUSH:
                flying[cookie] = None
                connection.sendall(request(FLUSH, cookie, 0, 0))
                continue
            write = flying[cookie] = self.model.begin(first, end, zero=kind != WRITE)
            length = (end - first) * BLOCK
            data = content(write.number) * (end - first) if kind == WRITE else b""
            connection.sendall(request(kind, cookie, first * BLOCK, length) + data)
        started = time.monotonic()
        while flying:
            _, error, cookie = struct.unpack(">IIQ", receive(connection, 16))
            write = flying.pop(cookie)
            if error:
                self.error = f"a guest was told of error {error} for {write}"
                self._stop.set()
            elif write:
                write.done()
                self.acknowledged += 1
        if started > self.excused_until:
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)


def negotiate(connection, export):
    """Goes to an export with simple replies; OSError if it is not served."""
    receive(connection, 18)
    name = export.encode()
    data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    connection.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 7, len(data)) + data)
    while True:
        _, _, kind, length = struct.unpack(">QIII", receive(connection, 20))
        receive(connection, length)
        if kind == 1:
            return
        if kind >> 31:
            raise OSError("the export is not served")


def request(kind, cookie, offset, length):
    return struct.pack(">IHHQQI", 0x25609513, 0, kind, cookie, offset, length)


def receive(connection, length):
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise OSError("closed")
        data += part
    return data
