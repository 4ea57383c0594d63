"""Plain servers of one raw file on one kind of socket, and what is asked of them."""

import os
import time

import contenders
from loads import fio, used_s

SOCKETS = {"unix": "a unix socket", "tcp": "TCP", "tls": "TCP, inside TLS"}


class Serving(contenders.Contender):
    """`command` is how its program is started; `address` is where it is reached."""

    def __init__(self, t, program, socket, read_only):
        super().__init__(t, f"{program.replace(' ', '-')}-{socket}", program,
                         "page cache of this host")
        self.socket, self.read_only = socket, read_only

    def disk(self, role, base):
        """Those that only read share the file."""
        return base if self.read_only else super().disk(role, base)

    def start(self, base):
        self.base, self.disk_bytes = base, base.stat().st_size
        if self.socket == "unix":
            self.address = self.t.dir / self.socket_name
            listens = lambda: self.t.listens(self.socket_name)
        else:
            self.port = self.t.free_port()
            self.address = f"127.0.0.1:{self.port}"
            listens = lambda: self.t.listens_tcp(self.port)
        if self.socket == "tls" and not (self.t.dir / "pki").exists():
            self.t.brep("tls", "init", "pki")
            self.t.brep("tls", "issue", "pki", "localhost", "--host", "127.0.0.1")
        self.server = self.t.daemon(self.name, *self.command(base), ready=listens)

    def uri(self):
        if self.socket == "unix":
            return super().uri()
        if self.socket == "tcp":
            return f"nbd://{self.address}/"
        return f"nbds://{self.address}/?tls-certificates={self.t.dir}/pki/localhost"

    def command(self, base):
        raise NotImplementedError

    def processes(self):
        return [self.server]

    def stop(self):
        self.server.stop()
        # Some leave it behind.
        if self.socket == "unix":
            self.address.unlink(missing_ok=True)


class Brep(Serving):
    def __init__(self, t, socket, read_only=False):
        super().__init__(t, "brep nbd serve", socket, read_only)

    def command(self, base):
        listen = {"unix": self.t.uri(self.socket_name), "tcp": f"nbd://{self.address}",
                  "tls": f"nbds://{self.address}"}[self.socket]
        options = ["--tls-dir", "pki/localhost"] if self.socket == "tls" else []
        options += ["--read-only"] if self.read_only else []
        return [self.t.brep_path, "nbd", "serve", self.disk("disk", base), "--listen", listen,
                *options]


class Nbdkit(Serving):
    """With one of its plugins."""

    def __init__(self, t, plugin, socket, read_only=False):
        super().__init__(t, f"nbdkit {plugin}", socket, read_only)
        self.plugin = plugin

    def command(self, base):
        at = ["--unix", self.address] if self.socket == "unix" else [
            "--ipaddr", "127.0.0.1", "--port", self.port]
        tls = ["--tls", "require", "--tls-certificates", self.t.dir / "pki/localhost",
               "--tls-verify-peer"] if self.socket == "tls" else []
        # The other one answers at once and keeps nothing: what the load itself can do.
        of = self.disk("disk", base) if self.plugin == "file" else f"size={self.disk_bytes}"
        return ["nbdkit", "--foreground", *at, *tls, *(["--readonly"] if self.read_only else []),
                self.plugin, of]


class QemuNbd(Serving):
    def __init__(self, t, socket, read_only=False):
        super().__init__(t, "qemu-nbd", socket, read_only)

    def command(self, base):
        at = ["-k", self.address] if self.socket == "unix" else ["-b", "127.0.0.1", "-p", self.port]
        tls = ["--object", "tls-creds-x509,id=tls,endpoint=server,dir=pki/localhost",
               "--tls-creds", "tls"] if self.socket == "tls" else []
        # It locks a file that it only reads as if nobody else might.
        image = ["--read-only", "--image-opts", "driver=raw,file.driver=file,file.locking=off,"
                 f"file.filename={base}"] if self.read_only else [
            "-f", "raw", self.disk("disk", base)]
        return ["qemu-nbd", "-t", "-e", "16", "--cache=writeback", *at, *tls, *image]


class Load:
    """`block` bytes at random places, `depth` requests in flight on each connection."""

    warms_up = False

    def __init__(self, by, name, title, rw, block, depth, connections):
        self.by, self.writes = by, rw == "write"
        of = f", {connections} connections" if connections > 1 else ""
        self.name = f"{by}-{rw}-{name}-qd{depth}-c{connections}"
        self.title = f"{title} {rw}, depth {depth}{of}"
        self.rw, self.block, self.depth, self.connections = rw, block, depth, connections


class Fio(Load):
    """fio's nbd engine, which asks for structured replies; a thread for each connection."""

    def measure(self, contender, runtime_s):
        return fio(contender, runtime_s, f"rand{self.rw}", self.block, self.depth, self.connections)


class Lean(Load):
    """`cargo xtask nbd-load`, which costs less than any server; simple replies."""

    def measure(self, contender, runtime_s):
        return contender.t.run(
            os.environ["BREP_XTASK"], "nbd-load", contender.address, "--export", contender.export,
            "--length", self.block, "--depth", self.depth, "--connections", self.connections,
            "--runtime", runtime_s, "--server-pid", contender.server.process.pid,
            *(["--write"] if self.writes else []), timeout_s=runtime_s + 60).json


class Nbdcopy:
    """The whole disk to nowhere, or a file to the whole disk; operations are requests."""

    warms_up = False

    def __init__(self, rw, name, title, block, connections):
        self.rw, self.block, self.connections = rw, block, connections
        self.writes = rw == "write"
        of = f", {connections} connections" if connections > 1 else ""
        self.name = f"nbdcopy-{rw}-{name}-c{connections}"
        self.title = f"nbdcopy, {title} {rw}s{of}"

    def measure(self, contender, _runtime_s):
        uri = contender.uri()
        what = [contender.base, uri] if self.writes else [uri, "null:"]
        before_s, started = used_s(contender), time.monotonic()
        contender.t.run("nbdcopy", f"--connections={self.connections}", "--no-extents",
                        f"--request-size={self.block}", *what, timeout_s=600)
        elapsed_s = time.monotonic() - started
        requests = contender.disk_bytes / self.block
        return {"iops": requests / elapsed_s,
                "server_us": (used_s(contender) - before_s) * 1e6 / requests}


BLOCKS = [("4k", "4 KiB", 4 << 10), ("64k", "64 KiB", 64 << 10), ("1m", "1 MiB", 1 << 20)]


def loads(kind, connections):
    by = {Lean: "lean", Fio: "fio"}[kind]
    return [kind(by, name, title, rw, block, depth, connections)
            for name, title, block in BLOCKS for rw in ("read", "write") for depth in (1, 32)]


# fio's engine cannot be told where certificates are.
COPIES = [Nbdcopy("read", "256k", "256 KiB", 256 << 10, 1),
          Nbdcopy("read", "256k", "256 KiB", 256 << 10, 4)]
LOADS = {
    "unix": loads(Lean, 1) + loads(Lean, 4) + loads(Fio, 1) + loads(Fio, 4),
    "tcp": loads(Lean, 1) + loads(Lean, 4) + loads(Fio, 1),
    "tls": [Nbdcopy("read", "4k", "4 KiB", 4 << 10, 1), *COPIES,
            Nbdcopy("write", "256k", "256 KiB", 256 << 10, 1)],
    "copy": COPIES,
}
