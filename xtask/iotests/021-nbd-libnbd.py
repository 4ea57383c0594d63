"""libnbd's clients use a brep export: nbdinfo sees its flags, nbdcopy copies over many connections.

Seen to fail with: CAN_MULTI_CONN not advertised.
"""

import json

import brep_iotest

FLAGS = ["is_read_only", "can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_df",
         "can_multi_conn"]


def run(t):
    t.require("nbdinfo", "nbdcopy")
    t.pattern_file("a.raw", 24 << 20, seed=1)
    server = t.serve("serve", "a.raw", "s.sock", "--export", "vda")
    info = json.loads(t.run("nbdinfo", "--json", t.uri("s.sock", "vda")).stdout)
    export = info["exports"][0]
    t.log(info["protocol"], "structured" if info["structured"] else "simple")
    t.log("size", export["export-size"], "contexts", *export["contexts"])
    for flag in FLAGS:
        t.log(flag, export.get(flag))
    t.log("list:", *[e["export-name"] for e in
                     json.loads(t.run("nbdinfo", "--list", "--json", t.uri("s.sock")).stdout)
                     ["exports"]])

    t.run("nbdcopy", "--connections=4", "--requests=64", t.uri("s.sock", "vda"), "copy.raw")
    t.equal(t.sha256("copy.raw"), t.sha256("a.raw"), "a copy over four connections")
    t.run("nbdcopy", "--synchronous", t.uri("s.sock"), "copy2.raw")
    t.equal(t.sha256("copy2.raw"), t.sha256("a.raw"), "a copy with one request at a time")
    t.pattern_file("b.raw", 24 << 20, seed=2)
    t.run("nbdcopy", "--connections=4", "--flush", "b.raw", t.uri("s.sock"))
    t.equal(t.sha256("a.raw"), t.sha256("b.raw"), "a copy to the export")
    server.stop()

    t.qemu_img("create", "-f", "qcow2", "a.qcow2", "24M")
    server = t.serve("serve", "a.qcow2", "s.sock")
    t.run("nbdcopy", "--connections=4", "--flush", "--destination-is-zero", "b.raw",
          t.uri("s.sock"))
    server.stop()
    t.qemu_img("check", "a.qcow2")
    t.qemu_img("compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "b.raw")
    t.log("copies: good")


brep_iotest.main(run)
