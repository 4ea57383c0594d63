"""Random kills, stops and checkpoints under load: no acknowledged write is ever lost.

Numbered writes and a model say what each image may hold: the primary's file after kill -9, both
files when nothing is in flight, the promoted disk, and its file after a merge that was killed.

Seen to fail with: zeroes written to the secondary without keeping what they overwrite.
"""

import random
import time

import brep_iotest
from brep_model import Guest, Model
from brep_pair import Pair, format_of, snapshot

# deadline_s: 120

SIZE = 16 << 20
TIMEOUT_S = 1
ROUNDS = [
    # Files of the primary and the secondary, --ack, interval, target of the failover.
    (1, ("p.raw", "s.raw"), "sync", "50ms", "latest"),
    (2, ("p.qcow2", "s.raw"), "async", "off", "checkpoint"),
    (3, ("p.raw", "s.qcow2"), "sync", "off", "checkpoint"),
]


def run(t):
    for seed, files, ack, interval, target in ROUNDS:
        t.run("rm", "-rf", "alpha", "beta", *files)
        Round(t, seed, files, ack, interval).run(target)
        t.log(f"{files[0]}, {files[1]}, {ack}, {target}: every image is what it may be")


class Round:
    def __init__(self, t, seed, files, ack, interval):
        self.t, self.files, self.interval = t, files, interval
        self.rng = random.Random(seed)
        self.model = Model(SIZE)
        self.pair = Pair(t, {"vda": files}, SIZE, interval=interval,
                         primary=["--ack", ack, "--peer-timeout", f"{TIMEOUT_S}s"],
                         secondary=["--peer-timeout", f"{TIMEOUT_S}s"])
        # When the last checkpoint was asked for, and when it was there.
        self.cut = None

    def run(self, target):
        self.pair.start()
        self.start_guests()
        events = [self.checkpoint, self.pause_secondary, self.kill_secondary, self.kill_primary]
        self.rng.shuffle(events)
        for event in events:
            time.sleep(self.rng.random() * 0.2)
            event()
        self.drained()
        self.start_guests()
        if target == "checkpoint":
            self.checkpoint()
        time.sleep(0.1 + self.rng.random() * 0.2)
        self.failover(target)

    def start_guests(self):
        self.guests = [Guest("p.sock", "vda", self.model, self.rng.random()) for _ in range(3)]

    def stop_guests(self):
        for guest in self.guests:
            guest.stop()
            self.t.expect(guest.slowest_s < TIMEOUT_S + 1.5,
                          f"a guest waited {guest.slowest_s:.1f} s")

    # --- events -------------------------------------------------------------------------------

    def checkpoint(self):
        begun = time.monotonic()
        self.pair.checkpoint()
        self.cut = (begun, time.monotonic())

    def pause_secondary(self):
        self.pair.secondary.pause()
        time.sleep(self.rng.choice([0.3, 2 * TIMEOUT_S]) * TIMEOUT_S)
        self.pair.status("alpha")
        self.pair.secondary.resume()
        self.heal()

    def kill_secondary(self):
        self.pair.secondary.kill9()
        self.check_images("beta")
        self.pair.start_secondary()
        self.heal()

    def kill_primary(self):
        for guest in self.guests:
            guest.excuse(20)
        self.pair.primary.kill9()
        self.model.server_died()
        now = time.monotonic()
        self.model.check(self.image(0), now, now, "the primary's file after kill -9")
        self.check_images("alpha")
        (self.t.dir / "p.sock").unlink(missing_ok=True)
        self.pair.start_primary()
        self.heal()

    def heal(self):
        """Until both sides have the same again, without any command."""
        def healed():
            status = self.pair.status("alpha")
            self.t.expect(status["link"] != "refused", f"refused: {status['reason']}")
            return status["disks"][0]["state"] == "in-sync" and \
                self.pair.status("beta")["link"] == "connected" and \
                self.pair.status("beta")["promotable"]
        time.sleep(0.3)
        self.t.wait_until(healed, "in sync again", deadline_s=30, step_s=0.1)
        # A copy ends with a checkpoint.
        self.cut = None

    # --- images -------------------------------------------------------------------------------

    def drained(self):
        """Nothing is in flight: both files are the same, and what the guests wrote."""
        self.stop_guests()
        self.pair.checkpoint()
        self.pair.stop()
        mine, theirs = self.files
        self.t.qemu_img("compare", "-f", format_of(mine), "-F", format_of(theirs), mine, theirs)
        self.check_images("alpha")
        self.check_images("beta")
        now = time.monotonic()
        self.model.check(self.image(0), now, now, "the primary's file", whole=True)
        self.pair.start_secondary()
        (self.t.dir / "p.sock").unlink(missing_ok=True)
        self.pair.start_primary()
        self.heal()

    def failover(self, target):
        self.pair.primary.kill9()
        self.model.server_died()
        killed = time.monotonic()
        self.stop_guests()
        self.pair.failover(target)
        snapshot(self.t, self.pair.promoted(), "now.raw")
        now = (self.t.dir / "now.raw").read_bytes()
        if target == "latest":
            self.model.check(now, killed, killed, "promoted to latest")
        else:
            self.model.check(now, *self.cut, "promoted to the checkpoint", whole=True)
        # The merge is killed while guests write.
        promoted = Model(SIZE, start=now)
        guests = [Guest("s.sock", "vda", promoted, self.rng.random()) for _ in range(2)]
        for _ in range(3):
            time.sleep(self.rng.random() * 0.1)
            self.pair.secondary.kill9()
            promoted.server_died()
            self.check_images("beta")
            (self.t.dir / "s.sock").unlink(missing_ok=True)
            self.pair.start_secondary()
        time.sleep(0.2)
        for guest in guests:
            guest.stop()
        self.t.expect(any(guest.acknowledged for guest in guests), "writes to the promoted disk")
        self.pair.wait_state("beta", "promoted")
        self.pair.secondary.stop()
        now = time.monotonic()
        promoted.check(self.image(1), now, now, "the file after the merge")

    def image(self, side):
        """What a file holds; its daemon is dead or has nothing in flight."""
        file = self.files[side]
        if format_of(file) == "raw":
            return (self.t.dir / file).read_bytes()
        self.t.qemu_img("convert", "-f", "qcow2", "-O", "raw", file, "image.raw")
        return (self.t.dir / "image.raw").read_bytes()

    def check_images(self, side):
        """After a kill clusters may leak, and nothing else."""
        files = [self.t.dir / self.files[side == "beta"], *(self.t.dir / side).glob("*.qcow2")]
        for file in files:
            if file.suffix == ".qcow2":
                code = self.t.qemu_img("check", file, code=None).code
                self.t.expect(code in (0, 3), f"no corruption in {file.name}: {code}")


brep_iotest.main(run)
