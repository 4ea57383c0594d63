"""A primary and a secondary on this machine, as real processes on unix sockets."""

import subprocess

from brep_iotest import FORMATS, Failed


class Pair:
    """`disks` maps a disk's name to the files on the primary and on the secondary."""

    def __init__(self, t, disks=None, size=16 << 20, primary=(), secondary=(), interval="off",
                 guest=False):
        self.t = t
        self.disks = disks or {"vda": ("p.raw", "s.raw")}
        self.size = size
        self.primary_options = ["--checkpoint-interval", interval, *primary]
        self.secondary_options = list(secondary)
        if guest:
            self.secondary_options += ["--guest-listen", t.uri("g.sock")]
        self.primary = self.secondary = None
        for files in self.disks.values():
            for file in files:
                if not (t.dir / file).exists():
                    t.qemu_img("create", "-f", format_of(file), file, str(size))

    # --- running ------------------------------------------------------------------------------

    def start(self):
        """Both sides, and the first copy done."""
        self.start_secondary()
        self.start_primary()
        self.wait_promotable()
        return self

    def start_secondary(self, *options):
        self.secondary = self.t.brep_daemon(
            "secondary", "secondary", "--name", "beta", "--state-dir", "beta", "--listen",
            self.t.uri("s.sock"), *self._disks(1), *self.secondary_options, *options,
            ready=lambda: self.t.listens("beta/control.sock") and self.t.listens("s.sock"))
        return self.secondary

    def start_primary(self, *options, peer=True):
        peer = ["--peer", self.t.uri("s.sock")] if peer else []
        self.primary = self.t.brep_daemon(
            "primary", "primary", "--name", "alpha", "--state-dir", "alpha", *peer,
            "--guest-listen", self.t.uri("p.sock"), *self._disks(0), *self.primary_options,
            *options,
            ready=lambda: self.t.listens("alpha/control.sock"))
        return self.primary

    def _disks(self, side):
        return [word for name, files in self.disks.items()
                for word in ("--disk", f"{name}={files[side]}")]

    def stop(self):
        """A clean stop by signal, primary first; buffers are kept."""
        self.primary.stop()
        self.secondary.stop()

    # --- asking -------------------------------------------------------------------------------

    def status(self, side):
        """`side` is alpha (the primary) or beta (the secondary)."""
        return self.brep(side, "status", "--json").json

    def disk_status(self, side, name="vda"):
        return next(d for d in self.status(side)["disks"] if d["name"] == name)

    def brep(self, side, *words, **options):
        return self.t.brep(*words, "--control", f"{side}/control.sock", **options)

    def wait_promotable(self, deadline_s=20):
        self.t.wait_until(lambda: self.status("beta")["promotable"], "a first checkpoint",
                          deadline_s)

    def wait_state(self, side, state, name="vda", deadline_s=20):
        if state == "promoted":
            # Whatever an old primary says that goes on alone.
            self.t.wait_until(lambda: self.is_merged(side), f"{side} is promoted and merged",
                              deadline_s)
            return
        self.t.wait_until(lambda: self.disk_status(side, name)["state"] == state,
                          f"{name} on {side} is {state}", deadline_s)

    def is_merged(self, side):
        status = self.status(side)
        return status["role"] == "promoted" and all(
            disk["progress"] is None for disk in status["disks"])

    def checkpoint(self, *options):
        return self.brep("alpha", "checkpoint", "--json", *options).json["epoch"]

    def failover(self, to="checkpoint", **options):
        return self.brep("beta", "failover", "--to", to, "--json", **options)

    # --- guests -------------------------------------------------------------------------------

    def guest(self, name="vda"):
        """The primary's export."""
        return self.t.uri("p.sock", name)

    def promoted(self, name="vda"):
        """The secondary's export after a failover."""
        return self.t.uri("s.sock", name)

    def second_guest(self, name="vda"):
        """The export for the secondary's own guest."""
        return self.t.uri("g.sock", name)

    def write(self, *commands, name="vda", **options):
        return self.t.qemu_io(self.guest(name), *commands, **options)

    def equal_files(self):
        """Both sides' files hold the same; both sides have to be stopped."""
        for mine, theirs in self.disks.values():
            self.t.qemu_img("compare", "-f", format_of(mine), "-F", format_of(theirs), mine,
                            theirs)
            for file in (mine, theirs):
                if format_of(file) == "qcow2":
                    self.t.qemu_img("check", file)


def format_of(file):
    return FORMATS["." + file.rsplit(".", 1)[-1]]


def snapshot(t, uri, file):
    """A copy of an export, by qemu-img."""
    t.qemu_img("convert", "-f", "raw", "-O", "raw", uri, file)
    return t.sha256(file)


class Writer:
    """A guest that writes one block at a time and notes each write that was acknowledged.

    Block n of the disk gets the number of the write, so that what is on a disk tells which
    writes are there: its blocks hold 1, 2, 3, ... up to some number, in order.
    """

    def __init__(self, t, uri, base=0, block=4096):
        self.t, self.base, self.block = t, base, block
        self.process = subprocess.Popen(
            [t.which("qemu-io"), "-f", "raw", uri], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.acknowledged = 0

    def write(self, count):
        """Writes the next blocks; returns whether all of them were acknowledged."""
        for _ in range(count):
            n = self.acknowledged
            try:
                # A pattern is one byte: the number's low 8 bits without 0, which means absent.
                self.process.stdin.write(
                    f"write -P {value(n)} {self.base + n * self.block} {self.block}\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                return False
            if not self._was_written():
                return False
            self.acknowledged += 1
        return True

    def _was_written(self):
        for line in self.process.stdout:
            if f"wrote {self.block}/{self.block} bytes" in line:
                return True
            if "failed" in line or "rror" in line:
                return False
        return False

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def value(n):
    return n % 255 + 1


def count_writes(t, file, base=0, length=None, block=4096):
    """How many of a `Writer`'s writes a raw copy holds; they have to be the first ones."""
    data = (t.dir / file).read_bytes()[base:]
    data = data[:length]
    count = 0
    while count * block < len(data) and data[count * block:(count + 1) * block] == \
            bytes([value(count)]) * block:
        count += 1
    if any(data[count * block:]):
        raise Failed(f"{file} holds {count} writes, and later ones after a gap")
    return count
