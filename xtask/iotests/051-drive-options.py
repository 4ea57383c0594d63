"""The original's `-drive` options: what is accepted, every refusal with its text and exit code, and
that a refusal leaves nothing behind.

Rows of series v3: §2 rules, §4 validation, §6 start, §8 errors, §11 open and start, §12 all.

Seen to fail with: the active disk looked at only by the start, which has made the state directory by
then.
"""

import brep_iotest

TARGET = "if=none,driver=raw,file=1.raw,id=nbd_target1"
HIDDEN = "backing_reference.hidden-disk."
REFERENCE = "backing_reference.drive_id=nbd_target1"
WRITABLE = f"{HIDDEN}allow-write-backing-file=on"


def active(file="active.qcow2", hidden="hidden.qcow2", export=",export=vda", reference=REFERENCE,
           driver="qcow2", writable=f",{WRITABLE}", more=""):
    return (f"driver=qcow2+colo,file={file}{export},{reference},{HIDDEN}file.filename={hidden},"
            f"{HIDDEN}driver={driver}{writable}{more}")


def quorum(pattern="read-pattern=fifo,", local="children.0.file.filename=p.raw,"
           "children.0.driver=raw,", host="children.1.file.host=127.0.0.1,", port="PORT",
           export="children.1.file.export=vda,", ignore="children.1.ignore-errors=on", more=""):
    return (f"driver=quorum,{pattern}{local}children.1.file.driver=nbd+colo,{host}"
            f"children.1.file.port={port},{export}children.1.driver=raw,{ignore}{more}")


# Row: the drives, in the order in which the original checks them.
SECONDARY = {
    "§12 both groups at once": [TARGET, active(more=",backing.file.filename=x.qcow2")],
    "§12 both groups, by name": [TARGET, active(more=",backing=nbd_target1")],
    "§12 both groups one level down": [
        TARGET, "driver=raw,file.driver=qcow2+colo,file.file.filename=active.qcow2,"
        f"file.{REFERENCE},file.{HIDDEN}file.filename=hidden.qcow2,"
        "file.backing.file.filename=x.qcow2"],
    "§12 the group one level down": [
        TARGET, f"driver=raw,file=active.qcow2,file.{REFERENCE}"],
    "§8 drive_id missing": [TARGET, "driver=qcow2+colo,file=active.qcow2,export=vda,"
                            f"{HIDDEN}file.filename=hidden.qcow2"],
    "§8 no hidden-disk": [TARGET, f"driver=qcow2+colo,file=active.qcow2,export=vda,{REFERENCE}"],
    "§8 a further option in the group": [
        TARGET, active(more=",backing_reference.hidden=1")],
    "§8 a further option of the hidden disk": [TARGET, active(more=f",{HIDDEN}export=vda")],
    "§8 unknown drive": [TARGET, active(reference="backing_reference.drive_id=nobody")],
    "§8 the drive is a guest's": [TARGET.replace("if=none", "if=virtio"), active()],
    "§8 the drive is a guest's by default": [TARGET.replace("if=none,", ""), active()],
    "§8 a target goes to a guest": [active(), TARGET.replace("if=none", "if=virtio")],
    "§8 its own drive": [active(reference="backing_reference.drive_id=me", more=",id=me")],
    "§8 a chain that reaches itself": [
        active(reference="backing_reference.drive_id=b", more=",id=a"),
        active("a2.qcow2", "h2.qcow2", reference="backing_reference.drive_id=a", more=",id=b")],
    "§8 the drive is a backing file": [
        TARGET, "if=none,driver=qcow2,file=a2.qcow2,id=top,backing=nbd_target1", active()],
    "§8 the drive is a target already": [
        TARGET, active(), active("a2.qcow2", "h2.qcow2", export=",export=vdb")],
    "§8 the drive is an active disk": [
        TARGET, active(more=",id=a"),
        active("a2.qcow2", "h2.qcow2", reference="backing_reference.drive_id=a")],
    "§8 one file twice": [TARGET, active(hidden="active.qcow2")],
    "§8 the disk is the active disk": [TARGET, active(file="1.raw")],
    "§8 no target file": [TARGET.replace("1.raw", "no.raw"), active()],
    "§8 the hidden disk is missing": [TARGET, active(hidden="no.qcow2")],
    "§8 the hidden disk is no image": [TARGET, active(hidden="p.raw")],
    "§8 the hidden disk cannot have a backing file": [TARGET, active(hidden="p.raw", driver="raw")],
    "§8 the job cannot start": [TARGET, active(writable="")],
    "§11 snapshots": [TARGET, active("snapshot.qcow2")],
    "§11 a backing name in the header": [TARGET, active("backed.qcow2")],
    "§11 a backing name in the hidden disk's": [TARGET, active(hidden="backed.qcow2")],
    "§11 export missing": [TARGET, active(export="")],
    "§11 no backing reference": [TARGET, "driver=qcow2+colo,file=active.qcow2,export=vda"],
    "§11 the active disk is longer": [TARGET, active("long.qcow2")],
    "§11 the hidden disk is longer": [TARGET, active(hidden="long.qcow2")],
    "§11 the disk is longer": [TARGET.replace("1.raw", "long.raw"), active()],
    "the active disk is not empty": [TARGET, active("full.qcow2")],
    "the hidden disk is not empty": [TARGET, active(hidden="full.qcow2")],
    "no format": [TARGET.replace("driver=raw,", ""), active()],
    "another format": [TARGET.replace("driver=raw", "driver=vmdk"), active()],
    "the group without qcow2+colo": [TARGET, active().replace("qcow2+colo", "qcow2")],
    "an unknown option": [TARGET + ",aio=native", active()],
    "an option twice": [TARGET + ",driver=raw", active()],
    "no value": [TARGET + ",readonly", active()],
    "no switch": [TARGET, active(writable=f",{WRITABLE}ly")],
    "a drive that nobody needs": [TARGET, active(), "if=none,driver=raw,file=p.raw,id=more"],
    "one id twice": [TARGET, TARGET.replace("1.raw", "p.raw"), active()],
    "no active disk": [TARGET],
    "a primary's drive": [quorum()],
    "a name that is no export": [TARGET, active(export=",export=a/b")],
}

PRIMARY = {
    "§6 read pattern": [quorum(pattern="vote-threshold=1,")],
    "§6 read pattern that does not exist": [quorum(pattern="read-pattern=lifo,")],
    "§6 no child supports it": [
        "driver=quorum,read-pattern=fifo,children.0.file.filename=p.raw,children.0.driver=raw,"
        "children.1.file.filename=1.raw,children.1.driver=raw"],
    "§6 too many children support it": [quorum(more=(
        ",children.2.file.driver=nbd+colo,children.2.file.host=h,children.2.file.export=vda,"
        "children.2.driver=raw,children.2.ignore-errors=on"))],
    "§2 the NBD client is the first child": [
        "driver=quorum,read-pattern=fifo,children.1.file.filename=p.raw,children.1.driver=raw,"
        "children.0.file.driver=nbd+colo,children.0.file.host=h,children.0.file.export=vda,"
        "children.0.driver=raw,children.0.ignore-errors=on"],
    "§2 two local disks": [quorum(
        more=",children.2.file.filename=1.raw,children.2.driver=raw")],
    "§3 ignore-errors missing": [quorum(ignore="children.1.ignore-errors=off")],
    "§3 ignore-errors of the local disk": [quorum(more=",children.0.ignore-errors=on")],
    "§3 an unknown option of a child": [quorum(more=",children.1.nonsense=on")],
    "§3 a threshold of 0": [quorum(pattern="read-pattern=fifo,vote-threshold=0,")],
    "§3 a threshold of 2": [quorum(pattern="read-pattern=fifo,vote-threshold=2,")],
    "§3 a threshold of 3": [quorum(pattern="read-pattern=fifo,vote-threshold=3,")],
    "§4 no host": [quorum(host="")],
    "§4 host and path": [quorum(more=",children.1.file.path=s.sock")],
    "§4 a port that is none": [quorum(port="99999")],
    "§4 no export": [quorum(export="")],
    "§4 an unknown option of the client": [quorum(more=",children.1.file.tls-creds=t")],
    "a child that is named": ["driver=quorum,read-pattern=fifo,children.0=disk,children.1=nbd"],
    "children with a hole": [quorum(more=",children.3.driver=raw")],
    "no children": ["driver=quorum,read-pattern=fifo"],
    "no quorum": ["driver=raw,file=p.raw"],
    "two secondaries": [quorum(), quorum(local="children.0.file.filename=1.raw,"
                                         "children.0.driver=raw,", port="10810",
                                         export="children.1.file.export=vdb,")],
    "one export twice": [quorum(), quorum(local="children.0.file.filename=1.raw,"
                                          "children.0.driver=raw,")],
    "one file twice": [quorum(), quorum(export="children.1.file.export=vdb,")],
    "an unknown option": [quorum(more=",werror=stop")],
}


def run(t):
    t.port = t.free_port()
    make_files(t)
    t.pattern_file("p.raw", 1 << 20)
    before = everything(t)
    listen = ["--listen", f"nbd://127.0.0.1:{t.port}"]
    guest = ["--guest-listen", t.uri("g.sock")]
    for side, rows, more in [("secondary", SECONDARY, listen), ("primary", PRIMARY, guest)]:
        t.log(f"--- {side}")
        for row, drives in rows.items():
            refused(t, before, row, side, drives, more)
    t.log("--- with other options")
    refused(t, before, "a primary without a guest", "primary", [quorum()], [])
    refused(t, before, "a secondary without a server", "secondary", [TARGET, active()], [])
    refused(t, before, "with --disk", "primary", [quorum()], [*guest, "--disk", "vda=p.raw"])
    refused(t, before, "with --peer", "primary", [quorum()],
            [*guest, "--peer", f"nbd://127.0.0.1:{t.port}"])

    t.log("--- the server cannot be")
    busy = t.serve("busy", "p.raw", "busy.sock")
    before = {name: t.sha256(name) for name in ("1.raw", "active.qcow2", "hidden.qcow2")}
    words = ["--drive", TARGET, "--drive", active(), "--listen", t.uri("busy.sock")]
    result = t.brep("secondary", *words, code=1, timeout_s=10)
    t.log(result.stderr.splitlines()[-1])
    t.equal({name: t.sha256(name) for name in before}, before, "the files")
    busy.stop()

    t.log("--- accepted")
    # §12: the target without a device, and a second drive that refers to it.
    starts(t, "secondary", [TARGET, active()], listen, "active.qcow2.brep")
    starts(t, "secondary", [active(more=",if=none,id=colo"), TARGET], listen, "active.qcow2.brep")
    starts(t, "secondary",
           [TARGET.replace("file=", "file.driver=file,file.filename="), active()],
           [*listen, "--state-dir", "elsewhere"], "elsewhere")
    starts(t, "primary", [quorum()], guest, "p.raw.brep")
    starts(t, "primary", [quorum(pattern="read-pattern=fifo,vote-threshold=1,", more=",if=virtio")],
           guest, "p.raw.brep")


def make_files(t):
    t.run("truncate", "-s", "1M", "1.raw")
    t.run("truncate", "-s", "2M", "long.raw")
    for name in ["active", "hidden", "a2", "h2", "snapshot", "full"]:
        t.qemu_img("create", "-f", "qcow2", f"{name}.qcow2", "1M")
    t.qemu_img("create", "-f", "qcow2", "long.qcow2", "2M")
    t.qemu_img("create", "-f", "qcow2", "-b", "a2.qcow2", "-F", "qcow2", "backed.qcow2")
    t.qemu_img("snapshot", "-c", "one", "snapshot.qcow2")
    t.qemu_io("full.qcow2", "write -P 1 0 4k")


def refused(t, before, row, side, drives, more):
    words = [word.replace("PORT", str(t.port)) for d in drives for word in ("--drive", d)]
    result = t.brep(side, *words, *more, code=None, timeout_s=10)
    t.expect(result.code in (1, 2, 3), f"{row}: {result.describe()}")
    t.log(f"{row}: exit code {result.code}")
    # clap's own texts are its own; of them the first lines count.
    t.log("  " + " ".join(result.stderr.split("\n\nUsage:")[0].split()))
    t.equal(everything(t), before, f"{row}: the files")
    t.expect(not t.listens_tcp(t.port), f"{row}: a server was left")


def everything(t):
    """All files with their contents."""
    return {str(path): t.sha256(path) if path.is_file() else "" for path in t.dir.rglob("*")}


def starts(t, side, drives, more, state_dir):
    words = [word.replace("PORT", str(t.port)) for d in drives for word in ("--drive", d)]
    daemon = t.brep_daemon(side, side, "--name", side, *words, *more,
                           ready=lambda: t.listens(f"{state_dir}/control.sock"))
    status = t.brep("status", "--control", f"{state_dir}/control.sock", "--json").json
    t.log(f"{side}: {[d['name'] for d in status['disks']]} in {state_dir}")
    daemon.stop()


brep_iotest.main(run)
