"""Either side of QEMU's own block replication, as a real process without a guest.

An address is the name of a unix socket in the scratch folder, or a TCP port of the loopback.
A QEMU secondary takes a checkpoint only with nothing in flight: between `hold` and `release` of
the primary, and with no request of the test's own under way.
"""

from brep_iotest import Failed

QEMU = "qemu-system-x86_64"
# Through the page cache, and a guest's flush reaches the disk: the same as brep's writeback.
CACHE = {"direct": False, "no-flush": False}


class QemuSide:
    """A QEMU without a machine: block devices, an NBD server, and a QMP socket."""

    def __init__(self, t, name):
        t.require(QEMU)
        self.t, self.name = t, name
        socket_name = f"{name}.qmp"
        self.process = t.daemon(
            name, QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-no-shutdown",
            "-qmp", f"unix:{socket_name},server=on,wait=off",
            ready=lambda: t.listens(socket_name))
        self.qmp = t.control(socket_name, deadline_s=30)

    def execute(self, command, **arguments):
        """The command's return value; top-level names may be written with underscores."""
        return self.qmp.execute(command, **arguments)

    def status(self):
        """What QEMU says of replication: None, or the description of an error."""
        said = self.execute("query-xen-replication-status")
        return said.get("desc", "an error") if said["error"] else None

    def hold(self):
        """Drains and stops the (absent) guest's disks: what QEMU wants around a checkpoint."""
        self.execute("stop")

    def release(self):
        self.execute("cont")

    def do_checkpoint(self):
        """`xen-colo-do-checkpoint` as it is, on this side alone."""
        self.execute("xen-colo-do-checkpoint")

    def stop(self):
        """Ends the process in good order."""
        self.execute("quit")
        self.qmp.close()
        self.process.wait()

    def kill9(self):
        self.qmp.close()
        self.process.kill9()

    def _raw(self, node, file):
        self.execute("blockdev-add", driver="raw", node_name=node, cache=CACHE,
                     file={"driver": "file", "filename": str(self.t.dir / file), "cache": CACHE})

    def _serve(self, address, **names):
        """Serves nodes under names."""
        self.execute("nbd-server-start", addr=_listening(self.t, address))
        for node, name in names.items():
            self.execute("block-export-add", type="nbd", id=f"exp-{node}", node_name=node,
                         name=name, writable=True)


class QemuSecondary(QemuSide):
    """A secondary over a raw file; exports `export` for the primary and `top0` for a guest."""

    def __init__(self, t, file, address, export="parent0", name="qemu-secondary"):
        super().__init__(t, name)
        size = (t.dir / file).stat().st_size
        self._raw("parent0", file)
        for node, below in (("hidden0", "parent0"), ("active0", "hidden0")):
            buffer = f"{name}-{node}.qcow2"
            t.qemu_img("create", "-f", "qcow2", buffer, str(size))
            self.execute("blockdev-add", driver="qcow2", node_name=node, backing=below,
                         file={"driver": "file", "filename": str(t.dir / buffer)})
        self.execute("blockdev-add", driver="replication", node_name="childs0", mode="secondary",
                     top_id="top0", file="active0")
        self.execute("blockdev-add", driver="quorum", node_name="top0", read_pattern="fifo",
                     vote_threshold=1, children=["childs0"])
        self._serve(address, parent0=export, top0="top0")
        self.execute("xen-set-replication", enable=True, primary=False)

    def failover(self):
        """Takes over; the merge goes on behind."""
        self.execute("nbd-server-stop")
        self.execute("xen-set-replication", enable=False, primary=False, failover=True)

    def is_merged(self):
        """Whether the secondary disk alone is the disk again."""
        graph = self.execute("x-debug-query-block-graph")
        ids = {node["name"]: node["id"] for node in graph["nodes"]}
        return any(edge["parent"] == ids["childs0"] and edge["child"] == ids["parent0"]
                   and edge["name"] == "file" for edge in graph["edges"])

    def wait_merged(self, deadline_s=30):
        self.t.wait_until(self.is_merged, "QEMU's secondary has merged", deadline_s,
                          step_s=0.002)


class QemuPrimary(QemuSide):
    """A primary over a raw file that forwards to `export` at `peer`; its guest's disk is `top0`."""

    def __init__(self, t, file, peer, guest, export="parent0", name="qemu-primary"):
        super().__init__(t, name)
        self.guest_address = guest
        self._raw("pdisk0", file)
        self.execute("blockdev-add", driver="quorum", node_name="top0", read_pattern="fifo",
                     vote_threshold=1, children=["pdisk0"])
        self.execute("blockdev-add", driver="replication", node_name="replication0",
                     mode="primary",
                     file={"driver": "nbd", "server": _connecting(t, peer), "export": export})
        self.execute("x-blockdev-change", parent="top0", node="replication0")
        self.execute("xen-set-replication", enable=True, primary=True)
        self._serve(guest, top0="top0")

    def guest(self):
        """The guest's disk, served on a unix socket."""
        return self.t.uri(self.guest_address, "top0")


def checkpoint(primary, secondary):
    """A checkpoint of a pair of QEMUs in which nobody has requests under way."""
    primary.hold()
    secondary.do_checkpoint()
    primary.do_checkpoint()
    primary.release()
    for side in (primary, secondary):
        if side.status():
            raise Failed(f"{side.name}: {side.status()}")


def _listening(t, address):
    """As `nbd-server-start` wants it."""
    if isinstance(address, int):
        return {"type": "inet", "data": {"host": "127.0.0.1", "port": str(address)}}
    return {"type": "unix", "data": {"path": str(t.dir / address)}}


def _connecting(t, address):
    """As the NBD driver wants it."""
    if isinstance(address, int):
        return {"type": "inet", "host": "127.0.0.1", "port": str(address)}
    return {"type": "unix", "path": str(t.dir / address)}
