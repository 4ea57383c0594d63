"""Guests over TCP: inside TLS if their certificate is on the list, else not at all; also after a
failover. What listens beyond loopback is encrypted, or that was asked for.

Seen to fail with: the list not applied to a promoted disk.
"""

import brep_iotest
from brep_pair import Pair


def run(t):
    t.brep("tls", "init", "pki", "alpha", "beta", "guest", "stranger")
    serving, receiving = t.free_port(), t.free_port()
    pair = Pair(t)
    common = ["--tls-allow", "CN=guest", "--disk"]
    secondary = t.brep_daemon(
        "secondary", "secondary", "--name", "beta", "--state-dir", "beta", "--listen",
        f"nbds://127.0.0.1:{receiving}", "--tls-dir", "pki/beta", "--tls-peer", "CN=alpha",
        *common, "vda=s.raw",
        ready=lambda: t.listens("beta/control.sock") and t.listens_tcp(receiving))
    primary = t.brep_daemon(
        "primary", "primary", "--name", "alpha", "--state-dir", "alpha", "--peer",
        f"nbds://127.0.0.1:{receiving}", "--guest-listen", f"nbd://0.0.0.0:{serving}",
        "--tls-dir", "pki/alpha", "--checkpoint-interval", "off", *common, "vda=p.raw",
        ready=lambda: t.listens("alpha/control.sock") and t.listens_tcp(serving))
    pair.primary, pair.secondary = primary, secondary
    pair.wait_promotable()

    def use(port, who, *commands, code=0):
        image = f"driver=nbd,host=127.0.0.1,port={port},export=vda"
        words = ["qemu-io", "--image-opts"]
        if who:
            words += ["--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={t.dir}/pki/{who}"]
            image += ",tls-creds=tls0"
        for command in commands:
            words += ["-c", command]
        result = t.run(*words, image, code=None)
        refused = "can't open" in result.stderr
        t.equal(refused, code != 0, f"{who} is refused: {result.describe()}")
        return result

    t.log("--- guests of the primary ---")
    use(serving, "guest", "write -P 7 0 1M", "flush")
    for who in ("stranger", "beta", None):
        t.log(who, use(serving, who, "read 0 4k", code=1).stderr.splitlines()[-1])
    pair.checkpoint()

    t.log("--- guests of a promoted secondary ---")
    use(receiving, "guest", "read 0 4k", code=1)
    primary.kill9()
    pair.failover()
    use(receiving, "guest", "read -P 7 0 1M", "write -P 8 1M 1M", "read -P 8 1M 1M")
    for who in ("stranger", None):
        use(receiving, who, "read 0 4k", code=1)
    t.log("the listed one only")

    t.log("--- what listens beyond loopback ---")
    t.qemu_img("create", "-f", "raw", "d.raw", "1M")
    for words in (["--listen", "nbd://0.0.0.0:1"],
                  ["--listen", "nbd://0.0.0.0:1", "--tls-dir", "pki/beta", "--tls", "optional"],
                  ["--listen", "nbds://127.0.0.1:1"],
                  ["--listen", "nbds://127.0.0.1:1", "--tls-dir", "pki/beta", "--tls", "off"],
                  ["--listen", "nbd://127.0.0.1:1", "--tls-dir", "nowhere"],
                  ["--listen", "nbd://127.0.0.1:1", "--tls-allow", "CN=guest"]):
        t.log_brep("nbd", "serve", "d.raw", *words)


brep_iotest.main(run)
