"""A real guest's ext4 after the loss of its host: what it fsynced before the checkpoint, whole.

Seen to fail with: a failover to what was received last.
"""

import brep_iotest
from brep_guest import Guest
from brep_iotest import Failed
from brep_pair import Pair

# deadline_s: 120

FILES = 20


def run(t):
    t.require("mkfs.ext4", "e2fsck", "debugfs")
    t.qemu_img("create", "-f", "raw", "p.raw", "64M")
    t.run("mkfs.ext4", "-q", "-F", "p.raw")
    pair = Pair(t, size=64 << 20).start()
    guest = Guest(t, "p.sock", "vda")
    guest.run("mount -t ext4 /dev/vda /mnt && cd /mnt")
    hashes = write_files(guest, "before")
    pair.checkpoint()
    write_files(guest, "after")
    # What the checkpoint holds is changed as well, and the change reaches the disk.
    guest.run("head -c 300000 /dev/urandom > before-7; rm before-8; mv before-9 moved; sync")
    guest.run("head -c 500000 /dev/urandom > never-synced")

    guest.kill9()
    pair.primary.kill9()
    pair.failover()
    t.qemu_img("convert", "-f", "raw", "-O", "raw", pair.promoted(), "promoted.raw")
    repaired = t.run("e2fsck", "-fy", "promoted.raw", code=None)
    t.expect(repaired.code in (0, 1), repaired.describe())
    t.run("e2fsck", "-fn", "promoted.raw")
    found = {name: name_hash(t, name) for name in names(t)}
    t.equal(found, hashes, "the files of the promoted disk")
    t.log(f"{len(found)} files as they were at the checkpoint, and no others")


def write_files(guest, prefix):
    """Writes and fsyncs files of many sizes; returns their hashes by name."""
    said = guest.run(
        f"for n in $(seq {FILES}); do head -c $((n * n * 1009)) /dev/urandom | "
        f"dd of={prefix}-$n conv=fsync 2> /dev/null || break; done; sha256sum {prefix}-*")
    if len(said) != FILES:
        raise Failed(f"the guest wrote {said}")
    return dict(reversed(line.split()) for line in said)


def names(t):
    """The regular files of the image."""
    lines = t.run("debugfs", "-R", "ls -p /", "promoted.raw").stdout.split()
    # /INODE/MODE/USER/GROUP/NAME/SIZE/
    entries = [line.split("/") for line in lines if line.startswith("/")]
    return [entry[5] for entry in entries if entry[2].startswith("100")]


def name_hash(t, name):
    t.run("debugfs", "-R", f"dump /{name} dumped", "promoted.raw")
    return t.sha256("dumped")


brep_iotest.main(run)
