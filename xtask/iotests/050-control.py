"""The control socket by hand: greeting, capabilities, bad input, types, out of band under a hang.

Seen to fail with: a greeting that lacks a member which the schema has.
"""

import json
import pathlib

import brep_iotest
from brep_control import Control
from brep_pair import Pair

# deadline_s: 90

BAD = [
    b"nonsense\n",
    b"{'execute':\x01",
    b"{]\n",
    b"[" * 200 + b"]" * 200,
    b"[]",
    b"12\n",
    b"{}",
    b"{'execute': 1}",
    b"{'execute': 'stop', 'arguments': 1}",
    b"{'execute': 'stop', 'x': 1}",
    b"{'exec-oob': 'query-status'}",
    b"{'execute': 'nope'}",
    b"{'execute': 'qmp_capabilities'}",
    b"{'execute': 'stop', 'arguments': {'x': 1}}",
    b"{'execute': 'xen-set-replication', 'arguments': {'enable': true}}",
    b"{'execute': 'xen-set-replication', 'arguments': {'enable': 1, 'primary': true}}",
    b"{'execute': 'checkpoint', 'arguments': {'wait': 'x'}}",
    b"{'execute': 'nbd-server-start', 'arguments': {'addr': {'type': 'fd'}}}",
    b"{'execute': 'nbd-server-start', 'arguments': {'addr': {'type': 'inet', 'data': {}}}}",
    b"{'execute': 'yank', 'arguments': {'instances': [{'type': 'x'}]}}",
]


def run(t):
    pair = Pair(t, primary=["--peer-timeout", "30s"], guest=True).start()
    greeting_and_negotiation(t)
    control = Control(t, "alpha/control.sock")
    for line in BAD:
        control.send(line)
        error = control.answer()["error"]
        shown = line.decode(errors="replace").strip()
        t.log(f"{shown:.70} ->", f"{error['class']}: {error['desc']}".split(": expected")[0])
    control.send(b"{'execute': 'query-version',\r\n 'id': {'a': ['\xc3\xbc']}}")
    t.equal(control.answer()["id"], {"a": ["\u00fc"]}, "an id comes back")
    for side in ("alpha", "beta"):
        types(t, Control(t, f"{side}/control.sock"))
    t.log("every query returns what the schema says")
    out_of_band(t, pair)


def greeting_and_negotiation(t):
    control = Control(t, "alpha/control.sock", raw=True)
    qmp = control.greeting["QMP"]
    t.log("capabilities", qmp["capabilities"], "version", sorted(qmp["version"]))
    t.log(control.refusal("query-version"))
    t.log(control.refusal("qmp_capabilities", enable=["x"]))
    t.equal(control.ask("qmp_capabilities", enable=["oob"]), {}, "negotiated")
    control.ask("query-version", oob=True)
    t.log(control.refusal("stop", oob=True))


def types(t, control):
    """What the queries return has the members of the schema, and no others."""
    schema = json.loads((pathlib.Path(__file__).resolve().parents[2] /
                         "docs/reference/control-schema.json").read_text())
    names = {entry["name"] for entry in control.ask("query-commands")}
    t.equal(names, {c["name"] for c in schema["commands"]}, "the commands of the schema")
    for command in schema["commands"]:
        if not command["name"].startswith("query-"):
            continue
        value = control.ask(command["name"])
        members = schema["types"][command["returns"].strip("[]")]
        for entry in value if command["returns"].startswith("[") else [value]:
            absent = {m for m, kind in members.items() if not kind.endswith("?")} - set(entry)
            t.equal(absent, set(), f"{command['name']}: members that are missing")
            t.equal(set(entry) - set(members), set(), f"{command['name']}: unknown members")


def out_of_band(t, pair):
    """The peer hangs, a command waits for it, and questions are answered."""
    control = Control(t, "alpha/control.sock", oob=True)
    pair.secondary.pause()
    waiting = control.begin("checkpoint")
    behind = control.begin("query-version")
    t.equal(control.ask("query-status", oob=True)["link"], "connected", "asked out of band")
    instances = control.ask("query-yank", oob=True)
    t.log("to be yanked:", [i.get("node-name", i["type"]) for i in instances])
    t.log(control.refusal("yank", oob=True, instances=[{"type": "chardev", "id": "x"}]))
    yank = control.begin("yank", oob=True, instances=instances)
    answers = {}
    while len(answers) < 3:
        answer = control.answer()
        answers[answer["id"]] = answer
    t.equal(answers[yank].get("return"), {}, "yank")
    t.expect("error" in answers[waiting], "the checkpoint ends when the peer is dropped")
    t.expect(list(answers).index(waiting) < list(answers).index(behind), "in order")
    t.equal(control.ask("query-status")["link"] == "connected", False, "the peer is dropped")
    pair.write("write -P 1 0 64k")
    t.log("yanked: the guest goes on alone")
    pair.secondary.resume()


brep_iotest.main(run)
