"""A pair whose sides change their roles: either may be run as either, on its own files."""

from brep_pair import Pair, format_of, snapshot


class Sides(Pair):
    """alpha is the primary at first, beta the secondary; each keeps its disk and its directory."""

    def __init__(self, t, **options):
        super().__init__(t, primary=["--peer-timeout", "2s"], **options)
        self.daemons = {}

    def start(self):
        super().start()
        self.daemons = {"alpha": self.primary, "beta": self.secondary}
        return self

    def _files(self, side):
        return self._disks(0 if side == "alpha" else 1)

    def run_primary(self, side, peer, *options, **more):
        """Runs a side as the primary; its guest's socket is SIDE.sock."""
        self.daemons[side] = self.t.brep_daemon(
            side, "primary", "--name", side, "--state-dir", side, *self._files(side),
            "--peer", self.t.uri(f"{peer}-link.sock"), "--guest-listen", self.t.uri(f"{side}.sock"),
            "--checkpoint-interval", "off", "--peer-timeout", "2s", *options,
            ready=lambda: self.t.listens(f"{side}/control.sock"), **more)

    def secondary_words(self, side, *options):
        return ["secondary", "--name", side, "--state-dir", side, *self._files(side), "--listen",
                self.t.uri(f"{side}-link.sock"), *options]

    def run_secondary(self, side, *options):
        self.daemons[side] = self.t.brep_daemon(
            side, *self.secondary_words(side, *options),
            ready=lambda: self.t.listens(f"{side}/control.sock"))

    def guest_of(self, side, name="vda"):
        return self.t.uri(f"{side}.sock", name)

    def wait_reason(self, side, words, deadline_s=20):
        self.t.wait_until(lambda: words in (self.status(side)["reason"] or ""),
                          f"{side} says {words!r}", deadline_s)

    def discarded(self, side, *options):
        """What a dry run says would be lost, by ranges of the first disk."""
        report = self.brep(side, "resync", "--discard-local", "--dry-run", "--json").json
        return report["disks"][0]

    def file_of(self, side, name="vda"):
        return self.disks[name][0 if side == "alpha" else 1]

    def stop_equal(self, primary="beta"):
        """Stops both, the primary first; both disks hold the same. Returns their hash."""
        self.brep(primary, "checkpoint")
        secondary = "alpha" if primary == "beta" else "beta"
        self.daemons[primary].stop()
        self.daemons[secondary].stop()
        mine, theirs = (self.t.sha256(self.file_of(side)) for side in ("alpha", "beta"))
        self.t.equal(mine, theirs, "hash of alpha's disk, and of beta's")
        return mine



class Peers:
    """Two sides that each know the other one's address, and are started again with the same words
    whatever they are: alpha.sock and beta.sock are where they listen, and serve their guest."""

    FILES = {"alpha": "p.raw", "beta": "s.raw"}

    def __init__(self, t, size):
        self.t, self.size = t, size
        for file in self.FILES.values():
            t.qemu_img("create", "-f", "raw", file, str(size))
        self.daemons = {}
        self.first_guest = True
        self.run("beta")
        self._daemon("alpha", "primary", "--guest-listen", t.uri("first.sock"))
        self.wait_in_sync("alpha")

    def run(self, side, *options):
        """Starts a side, as a secondary; one that was promoted goes on as the primary."""
        if side == "alpha":
            self.first_guest = False
        self._daemon(side, "secondary", *options)

    def _daemon(self, side, role, *options):
        t = self.t
        self.daemons[side] = t.brep_daemon(
            side, role, "--name", side, "--state-dir", side, "--disk", f"vda={self.FILES[side]}",
            "--listen", t.uri(f"{side}.sock"), "--peer", t.uri(f"{self.other(side)}.sock"),
            "--checkpoint-interval", "off", "--peer-timeout", "2s", *options,
            ready=lambda: t.listens(f"{side}/control.sock"))

    @staticmethod
    def other(side):
        return "beta" if side == "alpha" else "alpha"

    def kill(self, side):
        self.daemons[side].kill9()
        for name in (f"{side}.sock", *(["first.sock"] if side == "alpha" else [])):
            (self.t.dir / name).unlink(missing_ok=True)

    def guest(self, side, name="vda"):
        first = side == "alpha" and self.first_guest
        return self.t.uri("first.sock" if first else f"{side}.sock", name)

    def brep(self, side, *words, **options):
        return self.t.brep(*words, "--control", f"{side}/control.sock", **options)

    def status(self, side):
        return self.brep(side, "status", "--json").json

    def disk(self, side):
        return self.status(side)["disks"][0]

    def wait_in_sync(self, primary, deadline_s=30):
        def in_sync():
            there = self.status(self.other(primary))
            return self.disk(primary)["state"] == "in-sync" and there["promotable"]
        self.t.wait_until(in_sync, f"{primary} and its secondary are in sync", deadline_s)

    def bring_back(self, side):
        """An old primary returns as the secondary, and what it alone wrote is given up. Returns
        the bytes that were sent to it."""
        primary = self.other(side)
        before = self.status(primary)["counters"]["replicated-bytes"]
        self.run(side, "--discard-local")
        self.wait_in_sync(primary)
        return self.status(primary)["counters"]["replicated-bytes"] - before

    def stop_equal(self, primary):
        """Stops both; the disks hold the same. Returns their hash."""
        self.brep(primary, "checkpoint")
        for side in (primary, self.other(primary)):
            self.daemons[side].stop()
        hashes = {self.t.sha256(file) for file in self.FILES.values()}
        self.t.equal(len(hashes), 1, "different disks")
        return hashes.pop()


__all__ = ["Peers", "Sides", "format_of", "snapshot"]
