"""The example `mirror` of the quorum crate, and QEMU's quorum as its oracle."""

import json

from brep_example import Program


class Mirror(Program):
    """A mirror that serves on a unix socket, with its commands and events."""

    def __init__(self, t, options, *children, name="mirror"):
        uri = t.uri(f"{name}.sock")
        super().__init__(t, name, "mirror", "--listen", uri, "-o", options, *children)
        self.uri = uri

    def io(self, *commands, code=0):
        """qemu-io commands on the mirror, which is opened anew, and flushed in the end."""
        return self.t.qemu_io(self.uri, *commands, code=code)


def refusal(t, options, *children):
    """What it says to options that it does not take."""
    result = t.run(t.example("mirror"), "--listen", t.uri("refused.sock"), "-o", options,
                   *children, code=1)
    t.expect("panicked" not in result.stderr, result.describe())
    return result.stderr.strip()


def qemu_quorum(t, files, *commands, code=0, **options):
    """The same commands on QEMU's quorum over raw files, where qemu-io has one."""
    node = {"driver": "quorum", **{k.replace("_", "-"): v for k, v in options.items()},
            "children": [{"driver": "raw", "file": {"driver": "file", "filename": str(file)}}
                         for file in files]}
    args = [part for command in commands for part in ("-c", command)]
    result = t.run("qemu-io", *args, f"json:{json.dumps(node)}", code=None)
    if "Unknown driver 'quorum'" in result.stderr:
        return
    failed = result.code != 0 or "Pattern verification failed" in result.stdout
    t.equal(failed, code != 0, f"QEMU fails {commands}: {result.describe()}")


def lie(file, offset, byte, length=512):
    """Changes a file behind everybody's back."""
    with open(file, "r+b") as f:
        f.seek(offset)
        f.write(bytes([byte]) * length)
