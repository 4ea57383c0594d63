"""What an end-to-end test needs: daemons, waits, clients, patterns, hashes, filters.

A test is a function that takes a `Test` and is handed to `main`:

    import brep_iotest

    def run(t):
        t.brep("image", "create", "a.qcow2", "64M")
        t.qemu_io("a.qcow2", "write -P 7 0 64k")
        t.log(t.qemu_img("check", "a.qcow2").stdout)

    brep_iotest.main(run)

What it prints is compared with its .out file. Every wait has a deadline; every process that it
starts is ended when it ends, and dies with it if it is killed. Only Python's standard library.
"""

import ctypes
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback

SKIPPED = 77
# What an image's name says of its format.
FORMATS = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw"}


class Failed(Exception):
    """What the test checks is not so."""


class Skip(Exception):
    """The test cannot run here; the reason ends in `not found` or the like."""


def joined(extents):
    """Servers may cut an extent; what counts is where the state changes."""
    runs = []
    for e in extents:
        if runs and runs[-1][2] == e["type"]:
            runs[-1] = (runs[-1][0], runs[-1][1] + e["length"], e["type"])
        else:
            runs.append((e["offset"], e["length"], e["type"]))
    return runs


def main(run):
    """Runs the test and exits: 0 passed, 1 failed, 77 skipped."""
    _die_with_parent()
    # The runner ends a test by SIGKILL only after its deadline; a person may press ^C earlier.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    t = Test()
    code = 1
    try:
        run(t)
        t.close()
        code = 0
    except Skip as skip:
        print(f"SKIP: {skip}")
        code = SKIPPED
    except Failed as failed:
        frame = traceback.extract_tb(failed.__traceback__)
        own = [f for f in frame if not f.filename.endswith("brep_iotest.py")]
        where = f"{pathlib.Path(own[-1].filename).name}:{own[-1].lineno}: " if own else ""
        print(f"{where}{failed}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    finally:
        t.abandon(show_logs=code == 1)
    sys.stdout.flush()
    sys.exit(code)


def _die_with_parent():
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Result:
    """How a program ended and what it said, filtered on request."""

    def __init__(self, argv, code, stdout, stderr):
        self.argv, self.code, self.stdout, self.stderr = argv, code, stdout, stderr

    @property
    def json(self):
        return json.loads(self.stdout)

    def describe(self):
        return f"{' '.join(self.argv)}: exit code {self.code}\n{self.stdout}{self.stderr}"


class Test:
    """One test: its scratch folder is the current one."""

    def __init__(self):
        self.dir = pathlib.Path.cwd()
        self.brep_path = os.environ["BREP"]
        # The long form of a test that has one, with twenty times the time.
        self.long = os.environ.get("BREP_LONG") == "1"
        self._daemons = []
        self._filters = []
        self._stale_sockets = []

    # --- output -------------------------------------------------------------------------------

    def log(self, *things):
        """Prints for the comparison, without what differs from run to run."""
        print(self.filtered(" ".join(str(thing).rstrip("\n") for thing in things)))

    def hide(self, text, name):
        """From now on `name` stands for this text in the output."""
        self._filters.append((re.escape(str(text)), name))

    def filtered(self, text):
        text = text.replace(str(self.dir), "TEST_DIR").replace(self.brep_path, "brep")
        for pattern, name in self._filters:
            text = re.sub(pattern, name, text)
        for daemon in self._daemons:
            text = re.sub(rf"\b{daemon.pid}\b", f"PID({daemon.name})", text)
        text = re.sub(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:?\d\d)?", "TIME", text)
        return text

    def expect(self, condition, what):
        if not condition:
            raise Failed(f"not so: {what}")

    def equal(self, actual, expected, what):
        if actual != expected:
            raise Failed(f"{what}: {actual!r}, expected {expected!r}")

    def skip(self, reason):
        raise Skip(reason)

    def require(self, *programs):
        """Skips the test where a program is missing."""
        for program in programs:
            if not self.which(program):
                raise Skip(f"{program} not found")

    def which(self, program):
        return shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin")

    # --- programs -----------------------------------------------------------------------------

    def run(self, *argv, code=0, timeout_s=30, stdin=None):
        """Runs a program; any exit code but `code` fails the test (None: any code is good)."""
        argv = [str(arg) for arg in argv]
        argv[0] = self.which(argv[0]) or argv[0]
        try:
            done = subprocess.run(
                argv, input=stdin, stdin=None if stdin is not None else subprocess.DEVNULL,
                capture_output=True, text=True, errors="replace", timeout=timeout_s,
                preexec_fn=_die_with_parent)
        except subprocess.TimeoutExpired as late:
            raise Failed(f"{' '.join(argv)}: still running after {timeout_s} s\n"
                         f"{late.stdout}{late.stderr}") from None
        result = Result(argv, done.returncode, done.stdout, done.stderr)
        if code is not None and done.returncode != code:
            raise Failed(f"expected exit code {code}: {result.describe()}")
        return result

    def brep(self, *args, code=0, **options):
        return self.run(self.brep_path, *args, code=code, **options)

    def example(self, name):
        """The path of one of the crates' example programs."""
        path = pathlib.Path(os.environ["BREP_EXAMPLES"]) / name
        if not path.exists():
            raise Failed(f"{path} is not built: `cargo xtask iotest` builds it")
        return path

    def log_brep(self, *args, **options):
        """Runs brep with any exit code, and logs the command, what it said, and its code."""
        result = self.brep(*args, code=None, **options)
        self.log("$ brep", *args)
        for text in (result.stdout, result.stderr):
            if text.strip():
                self.log(text)
        if result.code:
            self.log(f"exit code {result.code}")
        return result

    def qemu_img(self, *args, **options):
        return self.run("qemu-img", *args, **options)

    def qemu_io(self, target, *commands, format=None, readonly=False, code=0, timeout_s=30,
                cache="writeback"):
        """Runs qemu-io commands on a file or URI; a pattern that does not match fails."""
        args = ["qemu-io", "-t", cache]
        if "://" in str(target) or "+unix:" in str(target) or str(target).startswith("nbd"):
            format = format or "raw"
        format = format or FORMATS.get(pathlib.Path(str(target)).suffix)
        if format:
            args += ["-f", format]
        if readonly:
            args.append("-r")
        for command in commands:
            args += ["-c", command]
        result = self.run(*args, str(target), code=code, timeout_s=timeout_s)
        said = result.stdout + result.stderr
        # Its exit code alone does not tell of every failed command in every version.
        if code == 0 and re.search(r"Pattern verification failed|failed:|invalid", said):
            raise Failed(result.describe())
        return result

    def daemon(self, name, *argv, ready=None, deadline_s=10, stdin=subprocess.DEVNULL, fds=()):
        """Starts a process with its output in NAME.log, and waits until `ready()` is true. It
        inherits the descriptors `fds`."""
        daemon = Daemon(self, name, [str(arg) for arg in argv], stdin, fds)
        self._daemons.append(daemon)
        if ready:
            def is_ready():
                if not daemon.alive():
                    raise Failed(f"{name} ended with {daemon.process.returncode}:\n{daemon.log()}")
                return ready()
            self.wait_until(is_ready, f"{name} is ready", deadline_s)
        return daemon

    def brep_daemon(self, name, *args, **options):
        return self.daemon(name, self.brep_path, *args, **options)

    def qemu_nbd(self, name, image, socket_name, *args, format=None):
        """A qemu-nbd that serves an image on a unix socket, until it is stopped."""
        format = format or FORMATS[pathlib.Path(image).suffix]
        return self.daemon(name, "qemu-nbd", "-f", format, "-k", self.dir / socket_name, "-t",
                           "-e", "16", *args, image, ready=lambda: self.listens(socket_name))

    def serve(self, name, image, socket_name, *args):
        """A `brep nbd serve` of an image on a unix socket, until it is stopped."""
        return self.brep_daemon(name, "nbd", "serve", image, "--listen",
                                f"nbd+unix:///?socket={self.dir / socket_name}", *args,
                                ready=lambda: self.listens(socket_name))

    # --- waiting ------------------------------------------------------------------------------

    def wait_until(self, condition, what, deadline_s=10, step_s=0.02):
        """Returns the condition's first true value; fails after the deadline."""
        end = time.monotonic() + deadline_s
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > end:
                raise Failed(f"not within {deadline_s} s: {what}")
            time.sleep(step_s)

    def listens(self, socket_name):
        """Whether somebody accepts connections on a unix socket."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(socket_name))
                return True
            except OSError:
                return False

    def listens_tcp(self, port):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def free_port(self):
        """A TCP port of the loopback that nobody had a moment ago; the output says PORT."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.hide(port, f"PORT{sum('PORT' in name for _, name in self._filters) + 1}")
        return port

    # --- data ---------------------------------------------------------------------------------

    def pattern_file(self, name, size, seed=0):
        """A file with bytes that depend on the seed and on the place."""
        with open(name, "wb") as file:
            for at in range(0, size, 1 << 20):
                file.write(pattern(min(1 << 20, size - at), f"{seed}/{at}"))
        return self.dir / name

    def sha256(self, path, offset=0, length=None):
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            file.seek(offset)
            left = length
            while left is None or left > 0:
                part = file.read(1 << 20 if left is None else min(left, 1 << 20))
                if not part:
                    break
                digest.update(part)
                left = None if left is None else left - len(part)
        return digest.hexdigest()

    def uri(self, socket_name, export=""):
        """The NBD URI of an export on a unix socket of the scratch folder."""
        return f"nbd+unix:///{export}?socket={self.dir / socket_name}"

    def control(self, path, deadline_s=10):
        """A client of a control socket, greeted and ready for commands."""
        return Control(self, path, deadline_s)

    # --- the end ------------------------------------------------------------------------------

    def close(self):
        """Ends a passing test: what still runs is stopped, and has to end well."""
        for daemon in reversed(self._daemons):
            if daemon.alive():
                daemon.stop()
        self._remove_stale_sockets()

    def abandon(self, show_logs):
        for daemon in reversed(self._daemons):
            if daemon.alive():
                daemon.kill9()
            if show_logs:
                print(f"--- {daemon.name}: {' '.join(daemon.argv)}\n{daemon.log()}",
                      file=sys.stderr)
        self._remove_stale_sockets()

    def _remove_stale_sockets(self):
        """A process that was killed could not remove its sockets; nobody else's are touched."""
        for path in self._stale_sockets:
            path.unlink(missing_ok=True)


def pattern(length, seed):
    """Bytes that nothing compresses and everybody can make again."""
    return hashlib.shake_128(str(seed).encode()).digest(length)


class Daemon:
    """A process of the test's own. Signals go to nobody else."""

    def __init__(self, test, name, argv, stdin=subprocess.DEVNULL, fds=()):
        self.test, self.name, self.argv = test, name, argv
        self.log_path = test.dir / f"{name}.log"
        # A daemon that is started again goes on in its log.
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(argv, stdin=stdin, stdout=log, stderr=log,
                                            preexec_fn=_die_with_parent, pass_fds=fds)
        self.pid = self.process.pid

    def log(self):
        return self.log_path.read_text(errors="replace")

    def alive(self):
        return self.process.poll() is None

    def wait(self, deadline_s=10):
        """The exit code (negative: the signal) once it has ended by itself."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.name} still runs after {deadline_s} s") from None

    def stop(self, code=0, deadline_s=10):
        """SIGTERM, and the exit code that has to follow (None: any; a signal's death is -15)."""
        self.process.terminate()
        ended = self.wait(deadline_s)
        # qemu-nbd takes SIGTERM as its normal end in some versions and dies of it in others.
        allowed = (0, -signal.SIGTERM) if "qemu-nbd" in self.argv[0] else (code,)
        if code is not None and ended not in allowed:
            raise Failed(f"{self.name} ended with {ended}, expected {code}:\n{self.log()}")
        return ended

    def kill9(self):
        self.test._stale_sockets += self._socket_paths()
        self.process.kill()
        self.process.wait()

    def pause(self):
        """SIGSTOP; returns when it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        self.test.wait_until(lambda: self._state() == "T", f"{self.name} is stopped")

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def _state(self):
        stat = pathlib.Path(f"/proc/{self.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0]

    def sockets(self):
        """The inodes of the sockets that the process has open."""
        inodes = set()
        try:
            for fd in pathlib.Path(f"/proc/{self.pid}/fd").iterdir():
                link = os.readlink(fd)
                if link.startswith("socket:["):
                    inodes.add(link[len("socket:["):-1])
        except OSError:
            # It has just ended, or has just closed one.
            pass
        return inodes

    def _socket_paths(self):
        """The sockets in the scratch folder that the process listens on."""
        return [path for path in self.test.dir.rglob("*") if path.is_socket()
                and self._listens_on(path)]

    def _listens_on(self, path):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                return False
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return struct.unpack("3i", credentials)[0] == self.pid


class Control:
    """A client of brep's control socket: JSON lines, greeting, commands, events."""

    def __init__(self, test, path, deadline_s=10):
        self.test = test
        self.events = []
        self._buffer = b""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(deadline_s)
        self._socket.connect(str(path))
        self.greeting = self._message()
        test.expect("QMP" in self.greeting, f"a greeting, not {self.greeting}")
        self.execute("qmp_capabilities")

    def send_raw(self, data):
        self._socket.sendall(data)

    def execute(self, command, **arguments):
        """The command's return value; an error fails the test."""
        reply = self.try_execute(command, **arguments)
        if "error" in reply:
            raise Failed(f"{command}: {reply['error']}")
        return reply["return"]

    def try_execute(self, command, **arguments):
        """The whole reply, `return` or `error`."""
        request = {"execute": command}
        if arguments:
            # Names of the protocol are written with hyphens.
            request["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        self.send_raw(json.dumps(request).encode() + b"\r\n")
        return self.reply()

    def reply(self):
        """The next message that is no event."""
        while True:
            message = self._message()
            if "event" not in message:
                return message
            self.events.append(message)

    def wait_event(self, name):
        """The first event of that name that has come or will come, and drops it."""
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    return event
            message = self._message()
            self.test.expect("event" in message, f"an event, not {message}")
            self.events.append(message)

    def close(self):
        self._socket.close()

    def _message(self):
        while b"\n" not in self._buffer:
            try:
                part = self._socket.recv(1 << 16)
            except socket.timeout:
                raise Failed("the control socket says nothing") from None
            if not part:
                raise Failed("the control socket was closed")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)
