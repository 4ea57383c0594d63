"""The crates' example programs that take commands and tell events, one JSON object in a line."""

import json
import subprocess

from brep_iotest import Failed


class Program:
    """One that serves on the unix socket NAME.sock."""

    def __init__(self, t, name, example, *args, before=()):
        self.t, self.name = t, name
        self._seen = 0
        self._answers = 0
        self.daemon = t.daemon(name, *before, t.example(example), *args,
                               ready=lambda: t.listens(f"{name}.sock"), stdin=subprocess.PIPE)

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
