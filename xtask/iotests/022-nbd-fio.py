"""fio's nbd engine writes and verifies through a brep export, with many requests in flight.

Seen to fail with: the last sector of longer writes dropped.
"""

import brep_iotest

# deadline_s: 120


def run(t):
    t.require("fio")
    if "nbd" not in t.run("fio", "--enghelp").stdout.split():
        t.skip("fio's nbd engine not found")
    for image in ("a.raw", "a.qcow2"):
        t.brep("image", "create", image, "32M")
        server = t.serve("serve", image, "s.sock")
        for name, options in {
            "random 4k": ["--rw=randwrite", "--bs=4k", "--iodepth=32"],
            "mixed sizes": ["--rw=randwrite", "--bsrange=512-128k", "--iodepth=16"],
            "sequential": ["--rw=write", "--bs=1M", "--iodepth=4"],
            "with trims": ["--rw=randtrimwrite", "--bs=4k", "--iodepth=8", "--verify=0"],
        }.items():
            result = t.run("fio", "--name=job", "--ioengine=nbd", f"--uri={t.uri('s.sock')}",
                           "--size=32M", "--verify=crc32c", "--verify_fatal=1", "--group_reporting",
                           "--randseed=1", "--io_size=16M", *options, timeout_s=60)
            t.expect("err= 0" in result.stdout, result.describe())
            t.log(f"{image}: {name}: verified")
        server.stop()
    t.qemu_img("check", "a.qcow2")


brep_iotest.main(run)
