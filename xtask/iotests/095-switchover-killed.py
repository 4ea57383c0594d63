"""A switchover during which either side is killed at any message of the link: in the end there is one
primary, without a command, both sides are in sync, and not one acknowledged write is lost.

Seen to fail with: a side that has made room and never asks the other one to take over.
"""

import brep_iotest
from brep_link import Tap
from brep_pair import Pair, Writer, count_writes, snapshot

# deadline_s: 150
SIZE = 96 << 20
STEPS = ("switchover-request", "switchover-answer", "cut", "cut-done", "committed", "take-over",
         "promoting", "holding", "stop")
# Where the roles are between the two records, or next to that.
SHORT = ("switchover-answer", "committed", "take-over", "promoting", "stop")
WRITES = 12


class Switching:
    def __init__(self, t):
        self.t = t
        self.to_beta = Tap(t.dir / "tap-b.sock", t.dir / "s.sock")
        self.to_alpha = Tap(t.dir / "tap-a.sock", t.dir / "a.sock")
        self.pair = Pair(t, size=SIZE, secondary=["--peer", t.uri("tap-a.sock"),
                                                  "--peer-timeout", "2s"])
        self.start_beta()
        self.start_alpha()
        self.pair.wait_state("alpha", "in-sync")
        self.now, self.other = "alpha", "beta"

    def start_alpha(self):
        t = self.t
        self.pair.primary = t.brep_daemon(
            "primary", "primary", "--name", "alpha", "--state-dir", "alpha", "--peer",
            t.uri("tap-b.sock"), "--listen", t.uri("a.sock"), "--guest-listen", t.uri("p.sock"),
            "--disk", "vda=p.raw", "--checkpoint-interval", "off", "--peer-timeout", "2s",
            ready=lambda: t.listens("alpha/control.sock"))

    def start_beta(self):
        self.pair.secondary = self.t.brep_daemon(
            "secondary", "secondary", "--name", "beta", "--state-dir", "beta", "--listen",
            self.t.uri("s.sock"), "--disk", "vda=s.raw", *self.pair.secondary_options,
            "--checkpoint-interval", "off", ready=lambda: self.t.listens("beta/control.sock"))

    def kill(self, side):
        (self.pair.primary if side == "alpha" else self.pair.secondary).kill9()
        for name in {"alpha": ("p.sock", "a.sock"), "beta": ("s.sock",)}[side]:
            (self.t.dir / name).unlink(missing_ok=True)

    def start(self, side):
        self.start_alpha() if side == "alpha" else self.start_beta()

    def export(self):
        return self.t.uri({"alpha": "p.sock", "beta": "s.sock"}[self.now], "vda")

    def settled(self):
        """Which side is the primary, when the two are in sync."""
        roles = {}
        for side in ("alpha", "beta"):
            status = self.pair.status(side)
            if status["link"] != "connected" or status["disks"][0]["state"] != "in-sync":
                return False
            roles[side] = status["role"]
        primaries = [side for side, role in roles.items() if role != "secondary"]
        self.t.equal(len(primaries), 1, f"primaries among {roles}")
        if self.now != primaries[0]:
            self.now, self.other = self.other, self.now
        return True

    def round(self, base, step, victim, drop):
        """One switchover in which a side is killed."""
        t = self.t
        guest = Writer(t, self.export(), base=base)
        t.expect(guest.write(WRITES), f"writes on {self.now}")
        guest.end()
        side = self.now if victim == "the primary" else self.other
        tap = self.to_beta if self.now == "alpha" else self.to_alpha
        before = self.now
        tap.at(step, lambda: self.kill(side), drop)
        self.pair.brep(self.now, "switchover", "--timeout", "10s", code=None)
        what = f"{victim} killed at {step}, {'dropped' if drop else 'passed on'}"
        t.expect(tap.seen.wait(5), f"{what}: it came by")
        self.start(side)
        t.wait_until(self.settled, f"one primary, {what}", deadline_s=30, step_s=0.1)
        snapshot(t, self.export(), "now.raw")
        held = count_writes(t, "now.raw", base=base, length=1 << 20)
        t.equal(held, WRITES, f"writes that are there, {what}")
        return before != self.now


def run(t):
    sides = Switching(t)
    base, done, rounds = 0, 0, 0
    for step in STEPS if t.long else SHORT:
        for victim in ("the primary", "the secondary"):
            for drop in (True, False) if t.long or step == "take-over" else (True,):
                done += sides.round(base, step, victim, drop)
                rounds += 1
                base += 1 << 20
    t.expect(0 < done < rounds, f"{done} of {rounds} switchovers were done")
    # And one that nobody disturbs.
    sides.pair.brep(sides.now, "switchover")
    t.wait_until(sides.settled, "one primary", deadline_s=30)
    sides.pair.brep(sides.now, "checkpoint")
    for side in (sides.now, sides.other):
        (sides.pair.primary if side == "alpha" else sides.pair.secondary).stop()
    t.equal(t.sha256("p.raw"), t.sha256("s.raw"), "the two disks")
    data = (t.dir / "p.raw").read_bytes()
    for at in range(0, base, 1 << 20):
        t.expect(data[at:at + 4096] == bytes([1]) * 4096, f"the writes at {at}")
    for name in ("tap-a.sock", "tap-b.sock"):
        (t.dir / name).unlink()
    t.log("one primary after each kill, and nothing lost")


brep_iotest.main(run)
