"""Servers that are absent, silent, stopped, or speak something else: an error in time.

Seen to fail with: no deadline on the handshake.
"""

import socket
import threading
import time

import brep_iotest

# What it says to whoever connects.
SPEECHES = {
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "silent": b"",
    "cut": b"NBDMAGIC",
    "wrong magic": b"NBDMAGIC" + b"\0" * 200,
    "noise": brep_iotest.pattern(4096, "noise"),
    "handshake only": b"NBDMAGICIHAVEOPT\0\x03",
}


def run(t):
    t.pattern_file("a.raw", 1 << 20)
    fails(t, "nobody.sock", "absent")
    for name, speech in SPEECHES.items():
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("bad.sock")
            listener.listen()
            threading.Thread(target=speak, args=(listener, speech), daemon=True).start()
            fails(t, "bad.sock", name)
        (t.dir / "bad.sock").unlink()

    server = t.qemu_nbd("stopped", "a.raw", "q.sock", "-r")
    server.pause()
    fails(t, "q.sock", "stopped")
    server.resume()
    t.brep("nbd", "info", t.uri("q.sock"))
    t.log("resumed: answers")


def fails(t, socket_name, name):
    started = time.monotonic()
    result = t.brep("nbd", "info", "--timeout", "1s", t.uri(socket_name), code=1, timeout_s=15)
    t.expect(time.monotonic() - started < 10, f"{name}: in time")
    t.expect(socket_name in result.stderr, f"{name}: the error names the server: {result.stderr}")
    t.expect("panicked" not in result.stderr, result.stderr)
    t.log(f"{name}: an error")


def speak(listener, speech):
    try:
        client, _ = listener.accept()
        client.sendall(speech)
        # Kept open: only the client's own deadline helps it.
        client.recv(1 << 16)
        time.sleep(20)
    except OSError:
        return


brep_iotest.main(run)
