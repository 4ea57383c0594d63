"""A small Linux guest in QEMU, by software emulation alone, driven by its serial console."""

import os
import pathlib
import socket

from brep_iotest import Failed
from brep_qemu import QEMU

# Each line that comes in is run; what it printed is followed by its exit code.
INIT = """#!/busybox sh
/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module; done
stty -echo
echo READY
while read -r line; do
    eval "$line"
    echo "CODE $?"
done
"""


class Guest:
    """A guest whose disk /dev/vda is an NBD export on a unix socket."""

    def __init__(self, t, socket_name, export, name="guest"):
        t.require(QEMU)
        folder = pathlib.Path(os.environ["BREP_GUEST"])
        if not folder.is_dir():
            t.skip("a Linux guest not found")
        self.t = t
        initramfs(folder, t.dir / f"{name}.cpio")
        console = t.dir / f"{name}.console"
        # It waits for the console's reader, so that nothing it says is lost.
        self.process = t.daemon(
            name, QEMU, "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-display", "none",
            "-no-reboot", "-kernel", folder / "vmlinuz", "-initrd", f"{name}.cpio",
            "-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on",
            "-serial", f"unix:{console},server=on,wait=on",
            "-blockdev", f"driver=nbd,node-name=disk,export={export},server.type=unix,"
                         f"server.path={t.dir / socket_name}",
            "-device", "virtio-blk-pci,drive=disk")
        self._console = t.wait_until(lambda: self._connect(console), f"{name}'s console")
        self._console.settimeout(60)
        self._buffer = b""
        while self._line() != "READY":
            pass

    def run(self, command, code=0):
        """The lines that a shell command printed; another exit code fails the test."""
        self._console.sendall(command.encode() + b"\n")
        lines = []
        while True:
            line = self._line()
            if line.startswith("CODE "):
                break
            lines.append(line)
        if line != f"CODE {code}":
            raise Failed(f"the guest's `{command}`: {line}, after {lines}")
        return lines

    def kill9(self):
        self._console.close()
        self.process.kill9()

    def _connect(self, path):
        if not self.process.alive():
            raise Failed(f"the guest has ended:\n{self.process.log()}")
        console = socket.socket(socket.AF_UNIX)
        try:
            console.connect(str(path))
            return console
        except OSError:
            console.close()
            return None

    def _line(self):
        while b"\n" not in self._buffer:
            try:
                part = self._console.recv(4096)
            except socket.timeout:
                raise Failed(f"the guest is silent after {self._buffer}") from None
            if not part:
                raise Failed(f"the guest has ended after {self._buffer}:\n{self.process.log()}")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace").strip()


def initramfs(folder, file):
    """Busybox, the disk's modules and the script above, as a cpio archive."""
    with open(file, "wb") as archive:
        for name in ("bin", "proc", "dev", "mnt", "modules"):
            _member(archive, name, 0o040755, b"")
        _member(archive, "init", 0o100755, INIT.encode())
        _member(archive, "busybox", 0o100755, (folder / "busybox").read_bytes())
        for module in sorted((folder / "modules").iterdir()):
            _member(archive, f"modules/{module.name}", 0o100644, module.read_bytes())
        _member(archive, "TRAILER!!!", 0, b"")


def _member(archive, name, mode, data):
    """One file in the "newc" format: a header of hexadecimal numbers, padded to 4 bytes."""
    encoded = name.encode() + b"\0"
    numbers = [0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0]
    header = b"070701" + b"".join(b"%08X" % number for number in numbers) + encoded
    archive.write(header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4))
