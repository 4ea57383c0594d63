"""A server that comes late is waited for, and a copy outlives one that is killed, where that is wanted.

Seen to fail with: --open-timeout and --reconnect-delay not handed on.
"""

import os

import brep_iotest

MIB = 1 << 20


def run(t):
    t.pattern_file("a.raw", 64 * MIB)
    late(t)
    killed(t)


def late(t):
    uri = t.uri("s.sock")
    t.brep("nbd", "info", uri, "--size", code=1)
    asking = [t.brep_daemon(f"asks-{name}", "nbd", *command, uri, *flags, "--open-timeout", "30s")
              for name, command, flags in [("info", ["info"], ["--size"]), ("map", ["info"], ["--map"]),
                                           ("list", ["list"], []), ("copy", ["copy", "-O", "raw"], ["late.raw"])]]
    server = t.serve("late", "a.raw", "s.sock")
    for client in asking:
        t.equal(client.wait(deadline_s=40), 0, client.log())
    server.stop()
    t.run("cmp", "a.raw", "late.raw")
    t.log("late: good")


def killed(t):
    for flags, code in [([], 1), (["--reconnect-delay", "30s"], 0)]:
        server = t.serve("first", "a.raw", "s.sock", "--read-only")
        copy = t.brep_daemon("copy", "nbd", "copy", t.uri("s.sock"), "copy.raw", "-C", "2", "-R", "2",
                             "--request-size", "4K", *flags)
        t.wait_until(lambda: os.path.exists("copy.raw") and os.stat("copy.raw").st_blocks * 512 > MIB,
                     "it has begun")
        server.kill9()
        t.expect(copy.alive() or code == 1, "it goes on")
        server = t.serve("second", "a.raw", "s.sock", "--read-only")
        t.equal(copy.wait(deadline_s=40), code, f"exit code with {flags}: {copy.log()}")
        server.stop()
        t.equal(os.path.exists("copy.raw"), code == 0, "half a copy is removed")
    t.run("cmp", "a.raw", "copy.raw")
    t.log("killed: good")


brep_iotest.main(run)
