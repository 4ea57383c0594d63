"""A service manager's sockets are served, it is told when, and they are left to it.

Seen to fail with: LISTEN_PID not compared; TLS demanded on each socket because one of them is TCP.
"""

import os
import socket
import subprocess

import brep_iotest


def run(t):
    t.pattern_file("a.raw", 1 << 20)
    t.run("cp", "a.raw", "b.raw")
    with listening("s.sock") as unix, tcp() as other, notified() as manager:
        t.hide(other.getsockname()[1], "PORT")
        server = start(t, "activated", [unix, other])
        t.equal(manager.recv(100), b"READY=1", "what the manager is told")
        for uri in (t.uri("s.sock"), f"nbd://127.0.0.1:{other.getsockname()[1]}"):
            t.qemu_img("compare", "-f", "raw", "-F", "raw", "b.raw", uri)
        server.stop()
        t.equal(manager.recv(100), b"STOPPING=1", "what the manager is told")
        t.log(server.log())
        t.expect(os.path.exists("s.sock"), "the manager's socket is left to it")

        again = start(t, "again", [unix])
        t.brep("nbd", "info", t.uri("s.sock"))
        again.stop()
        secured(t, unix, other)
        shared(t, unix)
        refusals(t, unix)
    for path in ("s.sock", "notify.sock"):
        os.unlink(path)


def secured(t, unix, other):
    """TLS is demanded of whom it can protect: those of the unix socket may go without."""
    t.brep("tls", "init", "pki", "alpha")
    server = start(t, "secured", [unix, other], "--tls-dir pki/alpha")
    t.brep("nbd", "info", t.uri("s.sock"))
    refused = t.brep("nbd", "info", f"nbd://127.0.0.1:{other.getsockname()[1]}", code=1)
    t.expect("TLS" in refused.stderr, f"no TLS over TCP: {refused.stderr}")
    server.stop()
    t.log(server.log())


def shared(t, unix):
    """A socket that others than its owner can use protects nobody."""
    os.chmod("s.sock", 0o666)
    refused = start(t, "shared", [unix], serves=False)
    t.equal(refused.wait(), 2, "exit code")
    t.log(refused.log())
    server = start(t, "shared-tls", [unix], "--tls-dir pki/alpha")
    refused = t.brep("nbd", "info", t.uri("s.sock"), code=1)
    t.expect("TLS" in refused.stderr, f"no TLS on a shared socket: {refused.stderr}")
    server.stop()
    start(t, "consent", [unix], "--allow-plaintext").stop()
    os.chmod("s.sock", 0o600)


def listening(path):
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(path)
    unix.listen()
    return unix


def tcp():
    other = socket.socket()
    other.bind(("127.0.0.1", 0))
    other.listen()
    return other


def notified():
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.settimeout(10)
    manager.bind("notify.sock")
    return manager


def start(t, name, sockets, flags="", serves=True):
    """A shell passes the descriptors on from 3, under the number of the process that it becomes."""
    for n, passed in enumerate(sockets):
        os.dup2(passed.fileno(), 50 + n, inheritable=True)
    moves = " ".join(f"{3 + n}<&{50 + n}" for n in range(len(sockets)))
    line = (f"exec env LISTEN_PID=$$ LISTEN_FDS={len(sockets)} NOTIFY_SOCKET={t.dir}/notify.sock "
            f"{t.brep_path} nbd serve a.raw --read-only {flags} {moves}")
    ready = lambda: "serving" in (t.dir / f"{name}.log").read_text()
    return t.daemon(name, "bash", "-c", line, fds=[50 + n for n in range(len(sockets))],
                    ready=ready if serves else None)


def refusals(t, unix):
    """Said before anything is served; exit 2."""
    fd = os.dup2(unix.fileno(), 50)
    def refused(what, line):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, pass_fds=[fd],
                              stdin=subprocess.DEVNULL, timeout=20)
        t.log(what, done.returncode, done.stderr)
    brep = f"{t.brep_path} nbd serve a.raw --read-only"
    refused("for another process:", f"exec env LISTEN_PID=1 LISTEN_FDS=1 {brep} 3<&50")
    refused("not open:", f"exec env LISTEN_PID=$$ LISTEN_FDS=1 {brep}")
    refused("both:", f"exec env LISTEN_PID=$$ LISTEN_FDS=1 {brep} --listen nbd://127.0.0.1:0 3<&50")
    refused("a file:", f"exec env LISTEN_PID=$$ LISTEN_FDS=1 {brep} 3<a.raw")


brep_iotest.main(run)
