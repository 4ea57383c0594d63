"""Commands take leave of a server with NBD_CMD_DISC, whether they went well or not.

Seen to fail with: a command that ends without waiting until its leave has been sent.
"""

import os
import socket
import struct
import threading

import brep_iotest

SIZE = 1 << 20
REQUEST, REPLY = 0x25609513, 0x67446698
FLAGS = 0b100000101  # flags, flush, several connections
COMMANDS = {0: "read", 1: "write", 2: "disc", 3: "flush"}
GO, ACK, INFO, UNSUPPORTED = 7, 1, 3, 2**31 + 1


class Server:
    """A server of its own, as plain as can be: it notes the last command of each connection."""

    def __init__(self, path, refuse=None):
        self.last = []
        self.refuse = refuse
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(16)
        self.lock = threading.Condition()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        with client, client.makefile("rb") as stream:
            client.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
            stream.read(4)
            while True:
                _, option, length = struct.unpack(">QII", stream.read(16))
                stream.read(length)
                if option == GO:
                    break
                self.option(client, option, UNSUPPORTED)
            self.option(client, GO, INFO, struct.pack(">HQH", 0, SIZE, FLAGS))
            self.option(client, GO, ACK)
            last = "nothing"
            while header := stream.read(28):
                _, _, command, cookie, _, length = struct.unpack(">IHHQQI", header)
                last = COMMANDS[command]
                if last == "disc":
                    break
                if last == "write":
                    stream.read(length)
                error = 5 if last == self.refuse else 0
                client.sendall(struct.pack(">IIQ", REPLY, error, cookie))
                if last == "read" and not error:
                    client.sendall(bytes(length))
            with self.lock:
                self.last.append(last)
                self.lock.notify()

    def option(self, client, option, kind, data=b""):
        client.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data)

    def ended(self, t, count):
        """How so many connections have ended."""
        with self.lock:
            t.expect(self.lock.wait_for(lambda: len(self.last) >= count, 10), "all have ended")
            last, self.last = self.last, []
        return last


def run(t):
    t.pattern_file("a.raw", SIZE)
    t.pattern_file("small.raw", 4096)
    for name, refuse in [("good", None), ("reads", "read"), ("flushes", "flush")]:
        server = Server(f"{name}.sock", refuse)
        uri = t.uri(f"{name}.sock")
        for command, connections in [
                (["copy", "small.raw", uri, "-C", "2"], 2), (["copy", uri, "copy.raw", "-C", "3"], 3),
                (["copy", uri, "-"], 4), (["info", uri, "--map"], 1), (["resize", uri, "2M"], 1)]:
            result = t.run(t.brep_path, "nbd", *command, code=None)
            left = server.ended(t, connections)
            t.equal(left, ["disc"] * connections, f"{command} of {name}")
            t.log(name, command[0], "exit code", result.code)
        result = t.brep("image", "compare", "a.raw", uri, code=None)
        t.equal(server.ended(t, 1), ["disc"], f"compare with {name}")
        t.log(name, "compare exit code", result.code)
        os.unlink(f"{name}.sock")


brep_iotest.main(run)
