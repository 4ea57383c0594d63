"""The link of a pair inside TLS: both sides know whom they talk to, and nobody else gets in.

Seen to fail with: private options taken in the clear; the subject of the peer not compared.
"""

import brep_iotest
from brep_pair import Pair


def run(t):
    t.brep("tls", "init", "pki", "alpha", "beta", "mallory")
    t.brep("tls", "init", "other", "alpha")
    pair = Pair(t, primary=["--tls-dir", "pki/alpha", "--tls-peer", "CN=beta"],
                secondary=["--tls-dir", "pki/beta", "--tls-peer", "CN=alpha"])
    pair.start()
    pair.write("write -P 7 0 1M", "flush")
    pair.checkpoint()
    for side in ("alpha", "beta"):
        t.log(side, pair.status(side)["tls"])
    shown = pair.brep("alpha", "status").stdout.splitlines()[0]
    t.log(shown)

    for name, options in (
            ("in the clear", []),
            ("with certificates of another authority", ["--tls-dir", "other/alpha"]),
            ("with somebody else's certificate", ["--tls-dir", "pki/mallory"]),
            ("that wants another secondary",
             ["--tls-dir", "pki/alpha", "--tls-peer", "CN=mallory"])):
        pair.primary.stop()
        pair.primary_options[:] = ["--checkpoint-interval", "off", *options]
        pair.start_primary("--no-start")
        pair.brep("alpha", "start")
        # It says first that the guest waits, and in brackets why.
        t.wait_until(lambda: "(" in (pair.status("alpha")["reason"] or ""), "a reason")
        t.log(f"--- a primary {name} ---")
        status = pair.status("alpha")
        t.log(status["link"], "/", status["reason"])
        t.expect(status["tls"] is None, "no TLS is shown without a connection")
        t.expect(pair.status("beta")["link"] != "connected", "the secondary let nobody in")

    pair.primary.stop()
    pair.primary_options[:] = ["--checkpoint-interval", "off", "--tls-dir", "pki/alpha"]
    pair.start_primary("--no-start")
    pair.brep("alpha", "start")
    pair.wait_state("alpha", "in-sync")
    pair.write("write -P 8 1M 1M")
    pair.stop()
    pair.equal_files()
    t.log("the right one is let in, and both hold the same")


brep_iotest.main(run)
