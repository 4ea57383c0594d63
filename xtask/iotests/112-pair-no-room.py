"""The file system of the secondary's buffers is full, then that of its disk: the guest goes on, the last
checkpoint stays exactly what it was, and replication goes on by itself when there is room.

Seen to fail with: a write that is carried out although its pre-image could not be copied; a failover for
which no room is kept.
"""

import brep_iotest
from brep_pair import Pair, snapshot

# deadline_s: 120

MIB = 1 << 20


def run(t):
    if t.run("unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt", code=None).code:
        t.skip("mount namespaces of one's own: not found")
    hidden_disk_full(t, failover=False)
    hidden_disk_full(t, failover=True)
    secondary_disk_full(t)


def hidden_disk_full(t, failover):
    t.run("rm", "-rf", "alpha", "beta", "p.raw", "s.raw")
    pair = Small(t, mount="beta", size_mib=28).start()
    for at in range(0, 60, 2):
        pair.write(f"write -P 2 {at}M 2M")
    t.equal(pair.status("alpha")["link"], "connected", "link")
    t.log("room is short: early checkpoints keep replication going")
    pair.checkpoint()
    expected = snapshot(t, pair.guest(), "checkpoint.raw")
    # More at once than there is room for.
    pair.write("write -P 3 0 60M")
    t.wait_until(lambda: pair.status("alpha")["link"] == "refused", "a refusal", 20)
    says_why(t, pair)
    t.expect(pair.disk_status("alpha")["bytes-behind"] > 0, "it lacks something")
    t.log("hidden disk full: the guest goes on, and both sides say why")
    if failover:
        pair.primary.kill9()
        # Somebody else takes what is left, to the last byte. A promotion makes files of its own.
        other = t.dir / "beta/other"
        pair.inside("sh", "-c", f"head -c 100M /dev/zero > {other}; ! echo x >> {other}")
        pair.failover()
        t.equal(snapshot(t, pair.promoted(), "promoted.raw"), expected, "the promoted disk")
        t.log("hidden disk full to the last byte: promoted to exactly the last checkpoint")
        pair.secondary.kill9()
        return
    pair.grow("200M")
    pair.wait_state("alpha", "in-sync", deadline_s=30)
    pair.checkpoint()
    pair.stop()
    pair.equal_files()
    t.log("room again: in sync by itself, and equal")


def says_why(t, pair):
    for side in ("alpha", "beta"):
        reason = pair.status(side)["reason"]
        t.expect("room" in reason, f"{side}: {reason}")
    errors = pair.status("alpha")["errors"]
    t.expect(any(e["errno"] == 28 and e["disk"] == "vda" for e in errors), f"ENOSPC: {errors}")
    t.expect(pair.status("beta")["promotable"], "promotable")


def secondary_disk_full(t):
    t.run("rm", "-rf", "alpha", "beta", "p.raw", "s.raw")
    pair = Small(t, mount="full", size_mib=24, disk="full/s.raw").start()
    pair.write("write -P 1 0 1M")
    pair.checkpoint()
    expected = snapshot(t, pair.guest(), "checkpoint.raw")
    pair.write("write -P 2 2M 40M")
    t.wait_until(lambda: pair.status("alpha")["errors"], "an error", 20)
    errors = pair.status("alpha")["errors"]
    t.expect(any(e["errno"] == 28 for e in errors), f"ENOSPC: {errors}")
    pair.primary.kill9()
    pair.failover()
    t.equal(snapshot(t, pair.promoted(), "promoted.raw"), expected, "the promoted disk")
    t.log("secondary's disk full: promoted to exactly the last checkpoint")
    pair.secondary.kill9()


class Small(Pair):
    """A pair whose secondary has a small file system, which only it sees, under `mount`."""

    def __init__(self, t, mount, size_mib, disk="s.raw"):
        super().__init__(t, {"vda": ("p.raw", "s.raw")}, size=64 * MIB)
        self.mount, self.size_mib, self.disk = mount, size_mib, disk

    def start_secondary(self, *options):
        (self.t.dir / self.mount).mkdir()
        script = (f"mount -t tmpfs -o size={self.size_mib}M none {self.mount} && "
                  f"truncate -s 64M {self.disk} && exec \"$@\"")
        self.secondary = self.t.daemon(
            "secondary", "unshare", "-Urm", "sh", "-c", script, "sh", self.t.brep_path,
            "secondary", "--name", "beta", "--state-dir", "beta", "--listen", self.t.uri("s.sock"),
            "--disk", f"vda={self.disk}", "--control", self.t.dir / "beta.sock",
            ready=lambda: self.t.listens("beta.sock") and self.t.listens("s.sock"))
        return self.secondary

    def brep(self, side, *words, **options):
        socket = "beta.sock" if side == "beta" else "alpha/control.sock"
        return self.t.brep(*words, "--control", socket, **options)

    def inside(self, *argv, **options):
        return self.t.run("nsenter", "-t", self.secondary.pid, "-U", "-m", "--preserve-credentials",
                          f"--wd={self.t.dir}", *argv, **options)

    def grow(self, size):
        self.inside("mount", "-o", f"remount,size={size}", self.mount)


brep_iotest.main(run)
