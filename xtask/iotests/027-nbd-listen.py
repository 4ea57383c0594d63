"""Listening: a port or socket in use, addresses beyond the loopback, URIs that make no sense.

Seen to fail with: a socket in use taken over; 0.0.0.0 taken for loopback.
"""

import socket

import brep_iotest


def run(t):
    t.brep("image", "create", "a.raw", "1M")
    t.brep("image", "create", "b.raw", "1M")

    port = t.free_port()
    with socket.create_server(("127.0.0.1", port)):
        result = serve(t, "a.raw", f"nbd://127.0.0.1:{port}")
        t.expect(result.code in (1, 3), f"a port in use: {result.describe()}")
        t.expect(str(port) in result.stderr, f"the error names the port: {result.stderr}")
    t.log("a port in use: refused")

    server = t.serve("serve", "a.raw", "s.sock")
    result = serve(t, "b.raw", t.uri("s.sock"))
    t.expect(result.code in (1, 3), f"a socket in use: {result.describe()}")
    t.expect("s.sock" in result.stderr, f"the error names the socket: {result.stderr}")
    t.qemu_io(t.uri("s.sock"), "write -P 1 0 64k", "read -P 1 0 64k")
    t.equal((t.dir / "s.sock").stat().st_mode & 0o777, 0o600, "mode of the socket")
    t.log("a socket in use: refused, and its owner goes on")

    # A socket that nobody listens on is what a kill -9 leaves: it is taken over.
    server.kill9()
    t.expect((t.dir / "s.sock").exists(), "the socket of a killed server is left")
    server = t.serve("serve", "a.raw", "s.sock")
    t.qemu_io(t.uri("s.sock"), "read -P 1 0 64k")
    server.stop()
    t.log("a dead socket: taken over")

    (t.dir / "file").write_text("precious")
    result = serve(t, "a.raw", t.uri("file"))
    t.expect(result.code in (1, 3), f"a file in the way: {result.describe()}")
    t.equal((t.dir / "file").read_text(), "precious", "a file in the way")
    t.log("a file in the way: left alone")

    for uri in ("nbd://0.0.0.0:10809", "nbd://[::]:10809", "nbd://127.0.0.1:99999", "http://x",
                "nbds://127.0.0.1", "nbd+unix:///", "127.0.0.1:10809", "nbd://127.0.0.1:1/name"):
        result = serve(t, "a.raw", uri)
        t.equal(result.code, 2, f"{uri}: {result.describe()}")
        t.log(f"{uri}: a usage error")


def serve(t, image, uri):
    return t.brep("nbd", "serve", image, "--listen", uri, code=None, timeout_s=10)


brep_iotest.main(run)
