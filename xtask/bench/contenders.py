"""What is measured: servers and pairs, each over files of its own that hold no zeroes.

All of them go through the page cache, and none is asked to flush: an acknowledged write survives
the end of any process. A contender serves `socket_name`/`export`; `checkpoint` begins an epoch.
"""

import os
import shutil

import brep_qemu
from brep_qemu import QemuPrimary, QemuSecondary


# What QEMU promises: nobody flushes before a write is acknowledged.
DURABILITY = ["--durability", "process"]


class Contender:
    """`title` is its column; `durability` says what a guest's acknowledged write survives."""

    export = ""
    # How much of a larger disk is loaded, in bytes.
    span = None

    def __init__(self, t, name, title, durability):
        self.t, self.name, self.title, self.durability = t, name, title, durability
        self.socket_name = f"{name}.sock"

    def uri(self):
        return self.t.uri(self.socket_name, self.export)

    def uris(self):
        """Of all that it serves."""
        return [self.uri()]

    def disk(self, role, base):
        """A copy of the base file; the one of an earlier round is taken again."""
        file = f"{self.name}-{role}.raw"
        if not (self.t.dir / file).exists():
            shutil.copyfile(base, file)
        return file

    def start(self, base):
        raise NotImplementedError

    def processes(self):
        """All that work for it."""
        raise NotImplementedError

    def checkpoint(self):
        """Nothing to do for a server alone."""

    def stop(self):
        self.server.stop()


class BrepPair(Contender):
    """Both sides; replication over TCP, the guest on a unix socket."""

    export = "vda"

    def __init__(self, t, ack, name=None, title=None, durability="process", size=None, disks=1):
        """`size`: sparse behind what is loaded. `disks`: that share what one has otherwise."""
        on = {"process": "page cache", "power": "disk"}[durability]
        survives = {"sync": f"{on} of both hosts",
                    "async": f"{on} of this host; on its way to the other"}[ack]
        super().__init__(t, f"brep-{name or ack}", title or f"brep --ack {ack}", survives)
        self.ack, self.size, self.options = ack, size, ["--durability", durability]
        self.exports = ["vda", *(f"vda{number}" for number in range(1, disks))]

    def uris(self):
        return [self.t.uri(self.socket_name, export) for export in self.exports]

    def disk(self, role, base):
        if not self.size:
            return super().disk(role, base)
        file = super().disk(role, base)
        if base:
            self.span = base.stat().st_size
        os.truncate(self.t.dir / file, self.size)
        return file

    def disks(self, role, base):
        """As options."""
        if len(self.exports) == 1:
            return ["--disk", f"vda={self.disk(role, base)}"]
        share, options = base.stat().st_size // len(self.exports), []
        for number, export in enumerate(self.exports):
            file = f"{self.name}-{role}-{export}.raw"
            with open(base, "rb") as whole, open(file, "wb") as part:
                whole.seek(number * share)
                part.write(whole.read(share))
            options += ["--disk", f"{export}={file}"]
        return options

    def start(self, base):
        self.port = self.t.free_port()
        self.secondary = _brep_secondary(self, base)
        self.secondary_control = self.t.control(f"{self.name}-beta/control.sock", 600)
        shutil.rmtree(f"{self.name}-alpha", ignore_errors=True)
        control = f"{self.name}-alpha/control.sock"
        self.primary = self.t.brep_daemon(
            f"{self.name}-primary", "primary", "--name", "alpha", "--state-dir",
            f"{self.name}-alpha", *self.disks("primary", base), "--peer",
            f"nbd://127.0.0.1:{self.port}", "--guest-listen", self.t.uri(self.socket_name),
            "--checkpoint-interval", "off", "--ack", self.ack, *self.options,
            ready=lambda: self.t.listens(control) and self.t.listens(self.socket_name))
        self.control = self.t.control(control, 600)
        # The first copy has to end.
        self.t.wait_until(lambda: self._copied(), f"{self.title} is in sync", 300)

    def _copied(self):
        return self.secondary_control.execute("query-status")["promotable"]

    def processes(self):
        return [self.primary, self.secondary]

    def checkpoint(self):
        self.control.execute("checkpoint")

    def failover(self):
        """Served when it returns."""
        self.secondary_control.execute("failover")

    def served_uri(self):
        """Where the promoted disk is read."""
        return ("127.0.0.1", self.port), self.export

    def wait_merged(self):
        """When it was merged, in seconds since 1970."""
        timestamp = self.secondary_control.wait_event("BREP_MERGED")["timestamp"]
        return timestamp["seconds"] + timestamp["microseconds"] / 1e6

    def lose_primary(self):
        self.control.close()
        self.primary.kill9()

    def lose_secondary(self, kind):
        if kind == "stopped":
            self.secondary.pause()
        else:
            self.secondary_control.close()
            self.secondary.kill9()

    def return_secondary(self, kind):
        if kind == "stopped":
            self.secondary.resume()
        else:
            self.secondary = _brep_secondary(self, None, fresh=False)
            self.secondary_control = self.t.control(f"{self.name}-beta/control.sock", 600)

    def stop(self):
        if self.primary.alive():
            self.control.close()
            self.primary.stop(deadline_s=60)
        self.secondary_control.close()
        self.secondary.stop(deadline_s=60)


class BrepPlainSecondary(Contender):
    """A secondary whose primary is the load generator; its replica on a unix socket."""

    export = "vda"

    def __init__(self, t):
        super().__init__(t, "brep-plain", "brep secondary", "page cache of this host")

    def start(self, base):
        self.secondary = _brep_secondary(self, base, "--plain-primary",
                                         listen=self.t.uri(self.socket_name))
        self.control = self.t.control(f"{self.name}-beta/control.sock", 600)

    def processes(self):
        return [self.secondary]

    def checkpoint(self):
        """A load that went away is a lost primary, after which replication begins anew."""
        if "error" in self.control.try_execute("checkpoint"):
            self.control.execute("replication-start")

    def stop(self):
        self.control.close()
        self.secondary.stop(deadline_s=60)


class QemuPair(Contender):
    export = "top0"

    def __init__(self, t):
        super().__init__(t, "qemu-pair", "QEMU pair", "page cache of both hosts")

    def start(self, base):
        port = self.t.free_port()
        self.secondary = QemuSecondary(self.t, self.disk("secondary", base), port,
                                       name="qemu-pair-secondary")
        self.primary = QemuPrimary(self.t, self.disk("primary", base), port, self.socket_name,
                                   name="qemu-pair-primary")

    def processes(self):
        return [self.primary.process, self.secondary.process]

    def checkpoint(self):
        brep_qemu.checkpoint(self.primary, self.secondary)

    def failover(self):
        self.secondary.failover()

    def wait_merged(self):
        self.secondary.wait_merged(600)

    def lose_primary(self):
        self.primary.kill9()

    def lose_secondary(self, kind):
        if kind == "stopped":
            self.secondary.process.pause()
        else:
            self.secondary.kill9()

    def return_secondary(self, kind):
        """One that was killed does not come back: there is no way but a full copy by hand."""
        if kind == "stopped":
            self.secondary.process.resume()

    def stop(self):
        for side in (self.primary, self.secondary):
            if side.process.alive():
                side.stop()


class QemuParent(Contender):
    """A secondary's export for its primary, with replication running."""

    export = "parent0"

    def __init__(self, t):
        super().__init__(t, "qemu-parent", "QEMU secondary", "page cache of this host")

    def start(self, base):
        self.secondary = QemuSecondary(self.t, self.disk("secondary", base), self.socket_name,
                                       name="qemu-parent-secondary")

    def processes(self):
        return [self.secondary.process]

    def checkpoint(self):
        self.secondary.do_checkpoint()

    def stop(self):
        self.secondary.stop()


def _brep_secondary(contender, base, *options, listen=None, fresh=True):
    t, name = contender.t, contender.name
    if isinstance(contender, BrepPair):
        options += (*contender.disks("secondary", base), *contender.options)
    else:
        options += ("--disk", f"vda={contender.disk('secondary', base)}", *DURABILITY)
    if fresh:
        shutil.rmtree(f"{name}-beta", ignore_errors=True)
    control = f"{name}-beta/control.sock"
    return t.brep_daemon(
        f"{name}-secondary", "secondary", "--name", "beta", "--state-dir", f"{name}-beta",
        "--listen", listen or f"nbd://127.0.0.1:{contender.port}", *options,
        ready=lambda: t.listens(control))
