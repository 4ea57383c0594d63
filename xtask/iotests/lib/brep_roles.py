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


__all__ = ["Sides", "format_of", "snapshot"]
