"""brep events: the present state first, then what happens, numbered without a gap; a reader that is
too slow is told how much it has missed, and where things stand.

Seen to fail with: a reader that goes on after a loss as if nothing was missing.
"""

import json
import time

import brep_iotest
from brep_control import Control
from brep_pair import Pair


def run(t):
    pair = Pair(t, primary=["--peer-timeout", "2s"]).start()
    pair.wait_state("alpha", "in-sync")
    reader = t.brep_daemon("reader", "events", "--json", "--control", "alpha/control.sock")

    def events():
        lines = reader.log().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait_event(what, condition):
        t.wait_until(lambda: any(condition(event) for event in events()), what)

    def disk_is(state):
        return lambda event: (event["event"] == "BREP_STATE"
                              and event["data"]["disks"][0]["state"] == state)

    t.wait_until(events, "the first line")
    first = events()[0]
    t.equal((first["event"], first["data"]["role"], first["data"]["disks"][0]["state"]),
            ("BREP_STATE", "primary", "in-sync"), "the present state comes first")
    epoch = pair.checkpoint()
    wait_event("the checkpoint", lambda e: e["event"] == "BREP_CHECKPOINT"
               and e["data"]["epoch"] == epoch)
    pair.secondary.kill9()
    wait_event("the loss", lambda e: e["event"] == "BREP_PEER_LOST")
    wait_event("its state", disk_is("disconnected"))
    pair.write("write -P 7 0 1M")
    pair.start_secondary()
    pair.wait_state("alpha", "in-sync")
    t.wait_until(lambda: disk_is("in-sync")(
        [e for e in events() if e["event"] == "BREP_STATE"][-1]), "in sync again")
    numbers = [event["sequence"] for event in events()]
    t.equal(numbers, list(range(numbers[0], numbers[0] + len(numbers))), "numbers")
    t.log("the state, then every change, numbered without a gap")

    # More than pipes, sockets and the backlog hold, while nobody reads. One that does not read for ten
    # seconds is closed: on a machine that is slow it takes several turns.
    control = Control(t, "alpha/control.sock")
    lost = lambda event: event["event"] == "EVENTS_LOST"
    while not any(map(lost, events())):
        seen = len(events())
        reader.pause()
        until = time.monotonic() + 6
        before = pair.status("alpha")["sequence"]
        while time.monotonic() < until and pair.status("alpha")["sequence"] < before + 4000:
            flood(control)
        reader.resume()
        t.wait_until(lambda: events()[-1].get("sequence", 0) >= pair.status("alpha")["sequence"],
                     "the end of the stream", deadline_s=60)
    told = events()[seen:]
    gap = next(i for i, event in enumerate(told) if event["event"] == "EVENTS_LOST")
    t.equal(told[gap + 1]["event"], "BREP_STATE", "after a loss the state is told again")
    lost = told[gap]["data"]["count"]
    t.equal(told[gap + 1]["sequence"], told[gap - 1]["sequence"] + lost, "how much was lost")
    t.log("a slow reader is told what it has missed")

    text = t.brep_daemon("text", "events", "--control", "beta/control.sock")
    t.wait_until(lambda: "role=secondary" in text.log(), "the state in words")
    pair.primary.kill9()
    t.wait_until(lambda: "disk vda=disconnected" in text.log(), "the loss in words")
    pair.failover()
    t.wait_until(lambda: "BREP_PROMOTED" in text.log(), "the promotion")
    t.wait_until(lambda: "role=promoted" in text.log(), "the new role")
    t.equal(reader.wait(), 1, "the stream has ended with its instance")
    pair.secondary.stop()
    t.equal(text.wait(), 1, "so has this one")
    t.log("and people can read it")


def flood(control):
    """A few commands at a time: this connection gets all the events too, and has to read them."""
    for _ in range(50):
        for id in [control.begin(command) for command in ("stop", "cont") * 2]:
            control.answer(id)
    control.events.clear()


brep_iotest.main(run)
