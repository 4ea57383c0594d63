"""A link between the two sides that a test can cut: a relay of unix sockets."""

import os
import selectors
import socket
import threading


class Relay:
    """Passes bytes between clients of one socket and the listener at another.

    `cut()` ends every connection at once; `freeze()` passes nothing on any more, in one direction
    or in both, without a word to either side, as a network does that drops packets.
    """

    def __init__(self, listen, target):
        self.target = str(target)
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
                        data = key.fileobj.recv(1 << 18)
                        if not data:
                            return
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
