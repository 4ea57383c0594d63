"""The example `mirror` of the quorum crate, and QEMU's quorum as its oracle."""

import json
import subprocess

from brep_iotest import Failed


class Mirror:
    """A mirror that serves on a unix socket, with its commands and events."""

    def __init__(self, t, options, *children, name="mirror"):
        self.t, self.name = t, name
        socket_name = f"{name}.sock"
        self.uri = t.uri(socket_name)
        self._seen = 0
        self._answers = 0
        self.daemon = t.daemon(name, t.example("mirror"), "--listen", self.uri, "-o", options,
                               *children, ready=lambda: t.listens(socket_name),
                               stdin=subprocess.PIPE)

    def io(self, *commands, code=0):
        """qemu-io commands on the mirror, which is opened anew, and flushed in the end."""
        return self.t.qemu_io(self.uri, *commands, code=code)

    def messages(self):
        """All that it has printed, in whole lines."""
        whole = self.daemon.log().rpartition("\n")[0].splitlines()
        return [json.loads(line) for line in whole if line.startswith("{")]

    def events(self):
        return [message for message in self.messages() if "event" in message]

    def wait_event(self, name, deadline_s=10, **data):
        """The next event that says this (since the one that was waited for last)."""
        def search():
            for at, event in enumerate(self.events()[self._seen:], self._seen):
                if event["event"] == name and all(
                        event["data"].get(key.replace("_", "-")) == value
                        for key, value in data.items()):
                    self._seen = at + 1
                    return event
            return None
        return self.t.wait_until(search, f"the event {name} with {data}", deadline_s)

    def forget_events(self):
        self._seen = len(self.events())

    def try_execute(self, command, **arguments):
        """The whole answer, `return` or `error`."""
        self._answers += 1
        id = self._answers
        request = {"execute": command, "id": id,
                   "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self.send(json.dumps(request))
        return self.t.wait_until(
            lambda: next((m for m in self.messages() if m.get("id") == id), None),
            f"an answer to {command}")

    def execute(self, command, **arguments):
        answer = self.try_execute(command, **arguments)
        if "error" in answer:
            raise Failed(f"{command}: {answer['error']}")
        return answer["return"]

    def refused(self, command, **arguments):
        """The text of the error that must come."""
        answer = self.try_execute(command, **arguments)
        self.t.expect("error" in answer, f"{command} is refused, not {answer}")
        return answer["error"]["desc"]

    def send(self, line):
        self.daemon.process.stdin.write(line.encode() + b"\n")
        self.daemon.process.stdin.flush()

    def quit(self):
        self.execute("quit")
        self.t.equal(self.daemon.wait(), 0, "exit code")


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
