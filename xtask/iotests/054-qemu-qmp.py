"""The control socket with a foreign client: the Python package qemu.qmp, and its shell.

Seen to fail with: a greeting without the version that the shell shows.
"""

import asyncio
import importlib.util
import os
import sys

import brep_iotest
from brep_pair import Pair

# deadline_s: 60


def run(t):
    if importlib.util.find_spec("qemu") is None or importlib.util.find_spec("qemu.qmp") is None:
        t.skip("the Python package qemu.qmp not found")
    pair = Pair(t).start()
    asyncio.run(converse(t))

    # Its shell, as a person would use it; it wants a home for its history.
    os.environ["HOME"] = str(t.dir)
    shell = t.run(sys.executable, "-m", "qemu.qmp.qmp_shell", "alpha/control.sock", code=None,
                  stdin="query-version\nstop\ncont\nx-colo-lost-heartbeat oops=1\n")
    said = shell.stdout + shell.stderr
    for text in ("Welcome to the QMP", '"package"', "Parameter 'oops' is unexpected"):
        t.expect(text in said, f"the shell says {text!r}:\n{said}")
    t.log("its shell: greeted, answered, refused")
    pair.stop()


async def converse(t):
    from qemu.qmp import ExecuteError, QMPClient

    client = QMPClient("test")
    await asyncio.wait_for(client.connect("alpha/control.sock"), 10)
    version = await client.execute("query-version")
    t.log("version", sorted(version))
    status = await client.execute("query-xen-replication-status")
    t.log("status", status)
    with client.listener(("STOP", "RESUME")) as listener:
        await client.execute("stop")
        await client.execute("cont")
        for _ in range(2):
            event = await asyncio.wait_for(listener.get(), 10)
            t.log("event", event["event"])
    # Several at a time: answers find their questions.
    answers = await asyncio.gather(*(client.execute("query-colo-status") for _ in range(20)))
    t.equal(len({str(answer) for answer in answers}), 1, "every question is answered")
    await client.execute("checkpoint", {"wait": "commit"})
    oob = await client.execute("query-yank", oob=True)
    t.log("out of band", len(oob))
    try:
        await client.execute("block-job-cancel", {"device": "nobody"})
    except ExecuteError as error:
        t.log(error.error_class, error)
    await client.disconnect()


brep_iotest.main(run)
