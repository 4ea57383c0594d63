"""A test view shows the same checkpoint however many are committed while it is open; what is written to
it is nobody else's, and the pair stays in sync. It ends by command, by itself when there is no room
for it, and with the process, and leaves nothing behind.

Seen to fail with: hidden disks that a commit gives up although a view reads in them.
"""

import threading

import brep_iotest
from brep_pair import Pair, snapshot

SIZE = 32 << 20
DISKS = {"vda": ("p.raw", "s.raw"), "vdb": ("p2.qcow2", "s2.qcow2")}


def run(t):
    while_checkpoints_commit(t)
    two_disks(t)
    no_room(t)


def fresh(t, **options):
    t.run("rm", "-rf", "alpha", "beta", *(f for files in DISKS.values() for f in files))
    t.pattern_file("p.raw", SIZE, seed=7)
    return Pair(t, size=SIZE, **options).start()


def test_of(t, pair, name):
    return pair.brep("beta", "failover", "--test", name, "--json").json


def while_checkpoints_commit(t):
    pair = fresh(t)
    refused = pair.brep("alpha", "failover", "--test", "try", code=3)
    t.expect("on the secondary" in refused.stderr, refused.stderr)
    t.equal(pair.brep("beta", "failover", "--test", "a/b", code=2).code, 2, "no name")
    t.equal(pair.brep("beta", "failover", "--test", "vda", code=2).code, 2, "a disk's name")
    pair.write("write -P 1 1M 1M")
    epoch = pair.checkpoint()
    wanted = snapshot(t, pair.guest(), "wanted.raw")
    # Beyond the checkpoint already when the view is opened.
    pair.write("write -P 2 0 512k", "write -P 2 8M 100k")
    report = test_of(t, pair, "try")
    t.equal(report["checkpoint"], epoch, "the checkpoint")
    view = t.uri("s.sock", "try")
    t.equal(report["uris"], [view], "where it is")
    refused = pair.brep("beta", "failover", "--test", "two", code=3)
    t.expect("one at a time" in refused.stderr, refused.stderr)

    stop = threading.Event()

    def guest():
        at = 0
        while not stop.is_set():
            at = (at + 700) % (SIZE // 1024 - 300)
            pair.write(f"write -P {at % 250 + 3} {at}k 300k", f"write -z {SIZE // 2048}k 4k")

    writer = threading.Thread(target=guest)
    writer.start()
    try:
        for round_ in range(12):
            for _ in range(3):
                pair.checkpoint()
            t.equal(snapshot(t, view, "now.raw"), wanted, f"the view in round {round_}")
    finally:
        stop.set()
        writer.join()
    # The view is written to, by units smaller and larger than those of the layers.
    change = ["write -P 91 1k 512", "write -P 92 3M 1M", "write -z 20M 70k", "discard 25M 64k",
              "flush"]
    for file in (view, "wanted.raw"):
        t.qemu_io(file, *change)
    pair.write("write -P 7 3M 2M")
    pair.checkpoint()
    t.qemu_img("compare", "-f", "raw", "-F", "raw", view, "wanted.raw")
    status = pair.status("beta")["test"]
    t.equal((status["name"], status["checkpoint"], status["ended"]), ("try", epoch, None), "status")
    t.expect(status["written-bytes"] > 1 << 20 and status["kept-bytes"] > 1 << 20, "bytes")
    t.equal(pair.disk_status("alpha")["state"], "in-sync", "the pair")
    t.expect(len(buffers(t)) < 12, f"few files however many checkpoints: {buffers(t)}")

    refused = pair.brep("beta", "failover", "--test-end", "other", code=3)
    t.expect("no test view" in refused.stderr, refused.stderr)
    pair.brep("beta", "failover", "--test-end", "try")
    t.equal(pair.status("beta")["test"], None, "no view")
    t.equal(t.qemu_io(view, "read 0 4k", code=1).code, 1, "nobody is served")
    pair.brep("beta", "failover", "--test-end", "try", code=3)
    t.log("a view stays the checkpoint that it was opened on")

    # A kill ends a view, and a restart gives its room back; so does a failover.
    test_of(t, pair, "try")
    t.qemu_io(t.uri("s.sock", "try"), "write -P 5 0 8M")
    pair.write("write -P 8 3M 2M")
    pair.checkpoint()
    pair.secondary.kill9()
    (t.dir / "s.sock").unlink()
    pair.start_secondary()
    pair.wait_state("alpha", "in-sync")
    t.equal(pair.status("beta")["test"], None, "no view after a restart")
    t.expect(len(buffers(t)) <= 6, f"files after a restart: {buffers(t)}")
    pair.checkpoint()
    wanted = snapshot(t, pair.guest(), "wanted.raw")
    pair.write("write -P 9 3M 2M")
    test_of(t, pair, "try")
    t.qemu_io(t.uri("s.sock", "try"), "write -P 5 0 1M")
    pair.primary.kill9()
    (t.dir / "p.sock").unlink()
    pair.failover()
    pair.brep("beta", "failover", "--test", "try", code=3)
    t.equal(snapshot(t, pair.promoted(), "now.raw"), wanted, "the promoted disk")
    pair.wait_state("beta", "promoted")
    t.equal(snapshot(t, pair.promoted(), "now.raw"), wanted, "the merged disk")
    pair.secondary.stop()
    t.log("ended by a kill, and by a failover")


def buffers(t):
    return sorted(path.name for path in (t.dir / "beta").glob("vda.*.qcow2"))


def two_disks(t):
    pair = fresh(t, disks=DISKS)
    pair.write("write -P 1 1M 1M", name="vdb")
    pair.checkpoint()
    wanted = {name: snapshot(t, pair.guest(name), f"{name}.raw") for name in DISKS}
    test_of(t, pair, "try")
    for name in DISKS:
        pair.write("write -P 3 1M 2M", name=name)
    pair.checkpoint()
    for name in DISKS:
        t.equal(snapshot(t, t.uri("s.sock", f"try/{name}"), "now.raw"), wanted[name], name)
    # A clean stop with a view open.
    pair.primary.stop()
    pair.secondary.stop()
    pair.equal_files()
    t.log("two disks, and equal in the end")


def no_room(t):
    pair = fresh(t, secondary=["--buffer-limit", "4M"])
    pair.checkpoint()
    test_of(t, pair, "try")
    view = t.uri("s.sock", "try")
    # What is written again takes its room once.
    t.qemu_io(view, *["write -P 4 0 1M"] * 8)
    t.expect(pair.status("beta")["test"]["ended"] is None, "there is room")
    t.qemu_io(view, *[f"write -P 4 {at}M 1M" for at in range(8)], code=1)
    t.wait_until(lambda: pair.status("beta")["test"]["ended"], "the view has ended")
    t.expect("--buffer-limit" in pair.status("beta")["test"]["ended"], "and says why")
    pair.write("write -P 6 0 3M")
    pair.checkpoint()
    # So does one for whose pre-images there is no room.
    test_of(t, pair, "try")
    for at in range(0, 24, 2):
        pair.write(f"write -P 7 {at}M 1500k")
        pair.checkpoint()
    t.wait_until(lambda: pair.status("beta")["test"]["ended"], "the view has ended")
    t.equal(t.qemu_io(view, "read 0 4k", code=1).code, 1, "nobody is served")
    t.equal(pair.disk_status("alpha")["state"], "in-sync", "the pair")
    t.equal(pair.status("alpha")["errors"], [], "errors")
    pair.stop()
    pair.equal_files()
    t.log("without room the view ends, and not the replication")


brep_iotest.main(run)
