"""A client of the control socket, by hand: what goes over the wire is what a test writes."""

import json
import socket
import time

from brep_iotest import Failed

DEADLINE_S = 20


class Control:
    """`raw` leaves out the negotiation; `oob` enables out-of-band execution."""

    def __init__(self, t, path, raw=False, oob=False):
        self.t = t
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(t.dir / path))
        self.input = b""
        self.events = []
        self.last_id = 0
        self.greeting = self.message()
        if not raw:
            arguments = {"enable": ["oob"]} if oob else {}
            self.ask("qmp_capabilities", **arguments)

    def send(self, text):
        self.socket.sendall(text if isinstance(text, bytes) else text.encode())

    def message(self, deadline_s=DEADLINE_S):
        """The next message, whatever it is."""
        deadline = time.monotonic() + deadline_s
        while b"\r\n" not in self.input:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                data = self.socket.recv(65536)
            except TimeoutError:
                raise Failed(f"no message within {deadline_s} s") from None
            if not data:
                raise Failed("the control socket was closed")
            self.input += data
        line, self.input = self.input.split(b"\r\n", 1)
        if not line.isascii():
            raise Failed(f"not ASCII: {line!r}")
        return json.loads(line)

    def answer(self, id=None, deadline_s=DEADLINE_S):
        """The next answer, or the one with this id; events before it are kept."""
        while True:
            message = self.message(deadline_s)
            if "event" in message:
                self.events.append(message)
            elif id is not None and message.get("id") != id:
                raise Failed(f"expected the answer to {id}: {message}")
            else:
                return message

    def begin(self, command, oob=False, **arguments):
        """Sends a command and returns its id. `_` in the arguments' names stands for `-`."""
        self.last_id += 1
        request = {"exec-oob" if oob else "execute": command, "id": self.last_id}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): v for name, v in arguments.items()}
        self.send(json.dumps(request))
        return self.last_id

    def ask(self, command, oob=False, **arguments):
        """What the command returns."""
        answer = self.answer(self.begin(command, oob, **arguments))
        if "error" in answer:
            raise Failed(f"{command}: {answer['error']}")
        return answer["return"]

    def refusal(self, command, oob=False, **arguments):
        """The class and the text of the error."""
        answer = self.answer(self.begin(command, oob, **arguments))
        if "error" not in answer:
            raise Failed(f"{command} succeeded: {answer}")
        return f"{answer['error']['class']}: {answer['error']['desc']}"

    def event(self, name, deadline_s=DEADLINE_S):
        """The data of the next event of this name; those before it are forgotten."""
        while True:
            event = self.events.pop(0) if self.events else self.message(deadline_s)
            if event.get("event") == name:
                return event.get("data")

    def close(self):
        self.socket.close()
