"""A promoted secondary is a primary: it takes a new secondary while its guest stays connected, and
remembers it over restarts, by either command.

Seen to fail with: a promoted disk behind the guest's door that is not the primary's.
"""

import brep_iotest
from brep_pair import Pair, Writer, snapshot


def run(t):
    pair = Pair(t).start()
    pair.write("write -P 9 8M 1M", "write -P 8 12M 64k")
    pair.checkpoint()
    pair.primary.kill9()
    pair.failover()
    guest = Writer(t, pair.promoted())
    t.expect(guest.write(20), "writes to the promoted disk")

    gamma = start_gamma(t, pair)
    # It listens in a directory that the daemon does not run in.
    pair.brep("beta", "peer", "set", t.uri("gamma.sock"))
    pair.wait_state("beta", "in-sync")
    t.equal(pair.status("beta")["role"], "primary", "role")
    t.expect(guest.write(20), "writes that are replicated")
    t.equal(pair.brep("beta", "peer", "set", t.uri("x.sock"), code=3).code, 3, "connected already")
    epoch = pair.brep("beta", "checkpoint", "--json").json["epoch"]
    t.equal(pair.status("gamma")["checkpoint"], epoch, "the checkpoint of the new secondary")
    t.log("a new secondary, and the guest stayed connected")

    # A restart remembers the peer; the guest waits for nobody.
    guest.end()
    for side, how in (("secondary", pair.start_secondary), ("primary", lambda: as_primary(pair))):
        pair.secondary.stop()
        how()
        pair.wait_state("beta", "in-sync")
        address = pair.promoted() if side == "secondary" else t.uri("b.sock", "vda")
        t.qemu_io(address, "write -P 7 1M 64k", "write -z 8M 128k", "flush")
        t.log(f"started as {side}: in sync again")

    # Without a peer it goes on alone, and brings the other one up to date when it has one again.
    pair.brep("beta", "peer", "clear")
    t.equal(pair.status("beta")["link"], "none", "link")
    t.qemu_io(t.uri("b.sock", "vda"), "write -P 6 3M 64k")
    pair.brep("beta", "peer", "set", t.uri("gamma.sock"))
    pair.wait_state("beta", "in-sync")
    pair.brep("beta", "checkpoint")
    now = snapshot(t, t.uri("b.sock", "vda"), "now.raw")
    pair.secondary.stop()
    gamma.stop()
    t.equal(t.sha256("s.raw"), now, "the file of the promoted side")
    t.equal(t.sha256("g.raw"), now, "the file of the new secondary")
    t.log("equal")


def start_gamma(t, pair):
    t.qemu_img("create", "-f", "raw", "g.raw", str(pair.size))
    return t.brep_daemon(
        "gamma", "secondary", "--name", "gamma", "--state-dir", "gamma", "--listen",
        t.uri("gamma.sock"), "--disk", "vda=g.raw",
        ready=lambda: t.listens("gamma/control.sock"))


def as_primary(pair):
    t = pair.t
    pair.secondary = t.brep_daemon(
        "secondary", "primary", "--name", "beta", "--state-dir", "beta", "--disk", "vda=s.raw",
        "--guest-listen", t.uri("b.sock"), "--checkpoint-interval", "off",
        ready=lambda: t.listens("beta/control.sock"))


brep_iotest.main(run)
