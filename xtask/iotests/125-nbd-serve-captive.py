"""An export for as long as a command runs, or until its last client has gone; limits, pid file.

Seen to fail with: the exit code of --run dropped.
"""

import json
import os
import signal
import socket
import struct

import brep_iotest

REPLY_MAGIC = bytes.fromhex("0003e889045565a9")


def run(t):
    t.pattern_file("a.raw", 4 << 20)
    t.run("cp", "a.raw", "b.raw")
    captive(t)
    last_client(t)
    limits(t)
    described(t)
    part(t)


def captive(t):
    serve = ["nbd", "serve", "a.raw", "--export", "vda"]
    said = t.brep(*serve, "--read-only", "--run",
                  'qemu-img compare -f raw -F raw b.raw "$uri" && test -S "$unixsocket" && '
                  'test "$exportname" = vda')
    t.log(said.stdout)
    t.expect("serving" not in said.stdout, "standard output is the command's")
    for command, code in [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("no-such-thing", 127)]:
        t.equal(t.brep(*serve, "--run", command, code=None).code, code, command)
    port = t.free_port()
    t.brep(*serve, "--listen", f"nbd://127.0.0.1:{port}", "--run",
           f'test "$uri" = nbd://127.0.0.1:{port}/vda && test "$port" = {port}')
    t.brep(*serve, "--run", 'qemu-io -f raw -c "write -P 5 0 64k" "$uri"')
    t.qemu_io("a.raw", "read -P 5 0 64k")
    left = [n for n in os.listdir("/tmp") if n.startswith("brep-") and
            os.path.exists(f"/tmp/{n}/nbd.sock")]
    t.equal(left, [], "sockets that are left")

    # A signal ends the command, then us, cleanly.
    daemon = t.brep_daemon("captive", *serve, "--run",
                           "trap 'echo told; exit 9' TERM; touch running; while :; do sleep 0.05; done",
                           ready=lambda: os.path.exists("running"))
    daemon.process.send_signal(signal.SIGTERM)
    t.equal(daemon.wait(), 9, "exit code after a signal")
    t.expect("told" in daemon.log(), daemon.log())
    t.log("captive: good")


def last_client(t):
    serve = ["nbd", "serve", "a.raw", "--listen", t.uri("s.sock"), "--exit-with-last-client"]
    server = t.brep_daemon("last", *serve, "--pid-file", "pid", ready=lambda: os.path.exists("pid"))
    t.equal(int(open("pid").read()), server.pid, "the number in the file")
    # Who only asks is no client.
    t.brep("nbd", "info", t.uri("s.sock"))
    t.expect(server.alive(), "it waits for a client")
    first = t.brep_daemon("first", "nbd", "info", t.uri("s.sock"), "--map")
    t.equal(first.wait(), 0, "the client")
    t.equal(server.wait(), 0, "it ends with its last client")
    t.expect(not os.path.exists("pid") and not os.path.exists("s.sock"), "nothing is left")
    t.log("last client: good")


def limits(t):
    server = t.serve("limited", "a.raw", "s.sock", "--max-connections", "2")
    with go(t) as a, go(t) as b:
        t.expect(a.recv(8) == b.recv(8) == REPLY_MAGIC, "two are served")
        with go(t) as third:
            third.settimeout(0.3)
            try:
                third.recv(8)
                t.expect(False, "a third one waits")
            except TimeoutError:
                pass
            t.brep("nbd", "info", t.uri("s.sock"))
            a.close()
            third.settimeout(10)
            t.equal(third.recv(8), REPLY_MAGIC, "until one has gone")
    server.stop()
    for count, offered in [("1", False), ("2", True)]:
        info = t.brep("nbd", "serve", "a.raw", "--max-connections", count, "--run",
                      f'{t.brep_path} nbd info --json "$uri"').json
        t.equal("multi-conn" in info["exports"][0]["capabilities"], offered, f"with {count}")
    t.log("limits: good")


def go(t):
    """A client that has asked for the default export."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect("s.sock")
    t.equal(client.recv(18)[:8], b"NBDMAGIC", "the greeting")
    client.sendall(struct.pack(">I8sIIIH", 3, b"IHAVEOPT", 7, 6, 0, 0))
    return client


def part(t):
    serve = ["nbd", "serve", "a.raw", "--offset", "1M", "--size", "64K"]
    t.brep(*serve, "--run", f'test "$({t.brep_path} nbd info --size "$uri")" = 65536 && '
           'qemu-io -f raw -c "write -P 9 0 64k" "$uri"')
    t.qemu_io("a.raw", "read -P 9 1M 64k")
    t.equal(t.sha256("a.raw", (1 << 20) + 65536), t.sha256("b.raw", (1 << 20) + 65536), "the rest")
    t.log_brep(*serve[:3], "--offset", "5M", "--run", "true")


def described(t):
    info = t.brep("nbd", "serve", "a.raw", "--export", "vda", "-D", "a disk", "--cache", "none",
                  "--run", f'{t.brep_path} nbd list --json "$uri"').json
    t.log(json.dumps(info["exports"]))
    t.log_brep("nbd", "serve", "a.raw")
    t.log_brep("nbd", "serve", "a.raw", "--exit-with-last-client", "--run", "true")
    t.brep("nbd", "serve", "a.raw", "--pid-file", "no/such/dir", "--run", "true", code=1)


brep_iotest.main(run)
