"""`--on-peer-lost suspend`: no write is acknowledged that is on one host alone, through a resync that
is interrupted, until the operator says otherwise; and never once the secondary was promoted.

Seen to fail with: a secondary that is lost in a resync and whose primary goes on alone; writes that are
let go although the secondary was promoted.
"""

import threading

import brep_iotest
from brep_pair import Pair, Writer, count_writes, snapshot

# deadline_s: 120

MIB = 1 << 20


def run(t):
    pair = Pair(t, size=48 * MIB, interval="200ms", primary=[
        "--peer-timeout", "2s", "--on-peer-lost", "suspend"]).start()
    guest = Load(t, pair)
    guest.let(20)
    pair.secondary.kill9()
    guest.wait_held()
    t.qemu_io(pair.guest(), "read -P 1 0 4k", "flush")
    t.expect("brep resume --lonely" in pair.status("alpha")["advice"], "what to do is said")
    pair.brep("alpha", "checkpoint", code=3)
    t.log("killed: writes are held, reads and flushes go on")

    # It returns; the write that was held is on both sides before it is acknowledged.
    pair.start_secondary()
    guest.wait_acknowledged()
    guest.let(20)
    t.log("it is back: writes go on")

    # Lonely, so that there is something to copy; then the copy is interrupted.
    pair.secondary.kill9()
    guest.wait_held()
    pair.brep("alpha", "resume", "--lonely")
    guest.wait_acknowledged()
    pair.write("write -P 7 8M 40M")
    pair.brep("alpha", "resync", "--rate", "8M")
    pair.start_secondary()
    pair.wait_state("alpha", "resyncing")
    guest.let(5)
    t.expect(pair.status("beta")["promotable"], "promotable to the last checkpoint meanwhile")
    pair.secondary.kill9()
    guest.wait_held()
    t.log("killed in a resync: held again")

    # It is promoted while the primary holds: nothing of what is held is ever acknowledged, also if an
    # operator asks for it. What was written alone makes it a split brain.
    acknowledged = guest.acknowledged
    pair.start_secondary("--no-start")
    pair.failover()
    t.wait_until(lambda: "split brain" in pair.status("alpha")["reason"],
                 "it hears of the promotion", 20)
    advice = pair.status("alpha")["advice"]
    t.expect("--discard-local" in advice and "--lonely" not in advice, advice)
    refused = pair.brep("alpha", "resume", "--lonely", code=3)
    t.expect("two that write" in refused.stderr, refused.stderr)
    t.equal(guest.acknowledged, acknowledged, "writes that were acknowledged by the old primary")
    guest.end()
    t.equal(pair.status("beta")["role"], "promoted", "role")
    snapshot(t, pair.promoted(), "promoted.raw")
    # The checkpoint from before the lonely time: everything that both sides had then.
    t.expect(count_writes(t, "promoted.raw", length=8 * MIB) >= 20, "what both had is there")
    # Nor when nobody is there any more who could say it again.
    pair.secondary.kill9()
    t.wait_until(lambda: pair.status("alpha")["link"] == "disconnected", "beta is gone", 20)
    pair.brep("alpha", "resume", "--lonely", code=3)
    t.equal(pair.disk_status("alpha")["state"], "split-brain", "state")
    t.log("promoted: the old primary acknowledges nothing")
    pair.primary.stop(deadline_s=20)


class Load:
    """A guest that writes one block after the other; it notices when it is held."""

    def __init__(self, t, pair):
        self.t, self.pair, self.writer = t, pair, Writer(t, pair.guest())
        self.thread = None

    @property
    def acknowledged(self):
        return self.writer.acknowledged

    def let(self, count):
        self.t.expect(self.writer.write(count), f"{count} writes")

    def wait_held(self):
        """A write is begun, and held."""
        before = self.acknowledged
        self.thread = threading.Thread(target=self.writer.write, args=(1,), daemon=True)
        self.thread.start()
        self.t.wait_until(lambda: self.pair.status("alpha")["held-writes"], "a write is held", 20)
        self.t.equal(self.acknowledged, before, "writes that were acknowledged")

    def wait_acknowledged(self):
        self.thread.join(20)
        self.t.expect(not self.thread.is_alive(), "the write that was held is acknowledged")

    def end(self):
        self.writer.end()


brep_iotest.main(run)
