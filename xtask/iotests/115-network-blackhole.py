"""Packets are lost in one direction, or in both, between two hosts: heartbeats notice it within their
deadline also where the guest is idle, no write waits longer, and when the network is well again the sides
find each other.

Seen to fail with: heartbeats that are not waited for.
"""

import threading
import time

import brep_iotest
from brep_pair import Pair

# deadline_s: 150

TIMEOUT_S = 2.0
# What a busy machine may add, and the pause before the next attempt to connect.
GRACE_S = 2.5
ALPHA, BETA = "10.114.7.1", "10.114.7.2"


def run(t):
    network = Network(t)
    pair = Pair(t, primary=["--peer-timeout", f"{TIMEOUT_S}s"],
                secondary=["--peer-timeout", f"{TIMEOUT_S}s"], interval="200ms")
    pair.secondary = t.daemon(
        "secondary", *network.inside("beta"), t.brep_path, "secondary", "--name", "beta",
        "--state-dir", "beta", "--listen", f"nbd://{BETA}:10809", "--allow-plaintext",
        *pair._disks(1), *pair.secondary_options, ready=lambda: t.listens("beta/control.sock"))
    pair.primary = t.daemon(
        "primary", *network.inside("alpha"), t.brep_path, "primary", "--name", "alpha",
        "--state-dir", "alpha", "--peer", f"nbd://{BETA}:10809", "--guest-listen",
        t.uri("p.sock"), *pair._disks(0), *pair.primary_options,
        ready=lambda: t.listens("alpha/control.sock"))
    pair.wait_promotable()
    at = 0
    for name, lost in (("nothing from the secondary arrives", ["beta"]),
                       ("nothing from the primary arrives", ["alpha"]),
                       ("nothing arrives", ["alpha", "beta"])):
        for busy in (False, True):
            pair.wait_state("alpha", "in-sync", deadline_s=30)
            at += 1
            load = Writes(t, pair, at) if busy else None
            begun = time.monotonic()
            for side in lost:
                network.lose(side)
            pair.wait_state("alpha", "disconnected")
            noticed_s = time.monotonic() - begun
            t.expect(noticed_s < TIMEOUT_S + GRACE_S, f"{name}: noticed after {noticed_s:.1f} s")
            t.wait_until(lambda: pair.status("beta")["link"] == "disconnected",
                         "the secondary notices it too", TIMEOUT_S + GRACE_S)
            t.qemu_io(pair.guest(), f"write -P {at} {at}M 64k")
            if load:
                longest_s = load.end()
                t.expect(longest_s < TIMEOUT_S + GRACE_S, f"{name}: a write took {longest_s:.1f} s")
            t.expect(pair.status("beta")["promotable"], "promotable")
            for side in lost:
                network.heal(side)
            pair.wait_state("alpha", "in-sync", deadline_s=30)
        t.log(f"{name}: noticed, no write waits long, and together again")
    pair.checkpoint()
    pair.stop()
    pair.equal_files()
    network.close()
    t.log("equal")


class Network:
    """Two hosts: namespaces of the test's own, and a cable between them."""

    def __init__(self, t):
        self.t = t
        t.require("unshare", "nsenter", "ip")
        if t.run("unshare", "-Urn", "true", code=None).code:
            t.skip("network namespaces of one's own: not found")
        alpha = t.daemon("alpha-host", t.which("unshare"), "-Urn", "sleep", "300")
        self.hosts = {"alpha": alpha}
        t.wait_until(lambda: self.ip("alpha", "link", code=None).code == 0, "a namespace")
        own = self.namespace(alpha)
        t.wait_until(lambda: self.namespace(alpha) != self.namespace_of("self"), "it is one's own")
        beta = t.daemon("beta-host", *self.inside("alpha"), t.which("unshare"), "-n", "sleep", "300")
        self.hosts["beta"] = beta
        t.wait_until(lambda: self.namespace(beta) not in (own, self.namespace_of("self")),
                     "another one")
        if self.ip("alpha", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns",
                   str(beta.pid), code=None).code:
            t.skip("virtual network cables: not found")
        for side, address in (("alpha", ALPHA), ("beta", BETA)):
            self.ip(side, "address", "add", f"{address}/24", "dev", "cable")
            self.ip(side, "link", "set", "cable", "up")
            self.ip(side, "link", "set", "lo", "up")

    def close(self):
        for host in self.hosts.values():
            host.kill9()

    def namespace_of(self, pid):
        return self.t.run("readlink", f"/proc/{pid}/ns/net").stdout

    def namespace(self, host):
        return self.namespace_of(host.pid)

    def inside(self, side):
        return [self.t.which("nsenter"), "-t", str(self.hosts[side].pid), "-U", "-n",
                "--preserve-credentials"]

    def ip(self, side, *words, code=0):
        return self.t.run(*self.inside(side), self.t.which("ip"), *words, code=code)

    def lose(self, side):
        """What this side sends is lost, without a word to it."""
        self.ip(side, "route", "add", "blackhole", BETA if side == "alpha" else ALPHA)

    def heal(self, side):
        self.ip(side, "route", "del", "blackhole", BETA if side == "alpha" else ALPHA)


class Writes:
    """A guest that writes all the time, and knows the longest time that it took."""

    def __init__(self, t, pair, value):
        self.t, self.pair, self.value = t, pair, value
        self.longest_s, self.ending = 0.0, False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        while not self.ending:
            begun = time.monotonic()
            self.t.qemu_io(self.pair.guest(), f"write -P {self.value} 0 64k")
            self.longest_s = max(self.longest_s, time.monotonic() - begun)

    def end(self):
        self.ending = True
        self.thread.join(30)
        return float("inf") if self.thread.is_alive() else self.longest_s


brep_iotest.main(run)
