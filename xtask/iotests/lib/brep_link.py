"""A link between the two sides that a test can cut: a relay of unix sockets."""

import os
import selectors
import socket
import threading


class Relay:
    """Passes bytes between clients of one socket and the listener at another.

    `cut()` ends every connection at once; `freeze()` passes nothing on any more, in one direction
    or in both, without a word to either side, as a network does that drops packets. With a `rate` no
    connection passes more than so many bytes a second to the listener.
    """

    def __init__(self, listen, target):
        self.target = str(target)
        self.rate = None
        self._frozen = frozenset()
        self._pairs = []
        self._lock = threading.Lock()
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(listen))
        self.server.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            upstream = socket.socket(socket.AF_UNIX)
            try:
                upstream.connect(self.target)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._pairs.append((client, upstream))
            threading.Thread(target=self._pass, args=(client, upstream), daemon=True).start()

    def _pass(self, client, upstream):
        try:
            with selectors.DefaultSelector() as ready:
                ready.register(client, selectors.EVENT_READ, (upstream, "there"))
                ready.register(upstream, selectors.EVENT_READ, (client, "back"))
                while True:
                    for key, _ in ready.select(0.05):
                        other, way = key.data
                        if way in self._frozen:
                            # Not read: what is sent fills the buffers of the sender.
                            threading.Event().wait(0.01)
                            continue
                        rate = self.rate if way == "there" else None
                        data = key.fileobj.recv(1 << 18 if rate is None else 1 << 14)
                        if not data:
                            return
                        if rate:
                            threading.Event().wait(len(data) / rate)
                        if self._show(data, other):
                            other.sendall(data)
        except OSError:
            pass
        finally:
            for end in (client, upstream):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                end.close()

    def _show(self, _data, _other):
        """Whether data are to be passed on."""
        return True

    def cut(self):
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for ends in pairs:
            for end in ends:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def freeze(self, *ways):
        """`there`: what clients send; `back`: what they are sent. None: everything flows."""
        self._frozen = frozenset(ways)

    def close(self):
        path = self.server.getsockname()
        self.server.close()
        self.cut()
        if os.path.exists(path):
            os.unlink(path)


class Tap(Relay):
    """A relay that stops at a message of the link: what is about to be passed on is shown first.

    `at(kind, act, drop)`: when the next message of this kind comes by, `act` is called, before it is
    passed on, or, with `drop`, instead; then the connection ends.
    """

    def __init__(self, listen, target):
        self._waits = None
        self.seen = threading.Event()
        super().__init__(listen, target)

    def at(self, kind, act, drop):
        self.seen.clear()
        self._waits = (f'"type":"{kind}"'.encode(), act, drop)

    def forget(self):
        self._waits = None

    def _show(self, data, other):
        """Whether the data are still to be passed on."""
        waits = self._waits
        if waits is None or waits[0] not in data:
            return True
        self._waits = None
        _, act, drop = waits
        if not drop:
            other.sendall(data)
        act()
        self.seen.set()
        raise OSError("the connection is ended here")
