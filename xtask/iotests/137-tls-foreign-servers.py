"""`brep nbd` inside TLS against nbdkit and qemu-nbd, with certificates checked on both sides.

Seen to fail with: a client's certificate that is not shown.
"""

import subprocess

import brep_iotest


def run(t):
    t.require("nbdkit")
    if "tls=yes" not in subprocess.run(["nbdkit", "--dump-config"], capture_output=True, text=True).stdout:
        t.skip("nbdkit with TLS not found")
    t.pattern_file("a.raw", 4 << 20)
    t.brep("tls", "init", "pki", "server", "guest")
    t.brep("tls", "init", "other", "guest")
    port = t.free_port()
    nbdkit = t.daemon("nbdkit", "nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "--tls=require", "--tls-verify-peer",
                      f"--tls-certificates={t.dir}/pki/server", "file", "a.raw", ready=lambda: t.listens_tcp(port))
    at(t, "nbdkit", port, "")
    nbdkit.stop(code=None)
    t.run("cp", "a.raw", "b.raw")
    port = t.free_port()
    qemu = t.daemon("qemu", "qemu-nbd", "-t", "-e", "8", "-b", "127.0.0.1", "-p", str(port), "-f", "raw", "-x", "vda",
                    "--object", f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir={t.dir}/pki/server",
                    "--tls-creds", "tls0", "b.raw", ready=lambda: t.listens_tcp(port))
    at(t, "qemu-nbd", port, "vda")
    qemu.stop(code=None)


def at(t, name, port, export):
    server = f"127.0.0.1:{port}/{export}"
    for who in ["pki/guest", "other/guest"]:
        code = t.brep("nbd", "info", "--size", f"nbds://{server}", "--tls-dir", who, code=None).code
        t.log(name, who, "exit code", code)
    clear = t.brep("nbd", "info", "--size", f"nbd://{server}", code=1)
    t.expect("TLS" in clear.stderr, f"what to do: {clear.stderr}")
    uri = f"nbds://{server}?tls-certificates={t.dir}/pki/guest"
    t.brep("nbd", "info", f"{uri}&tls-hostname=elsewhere", code=1)
    t.log(name, *t.brep("nbd", "list", uri).stdout.split())
    t.brep("nbd", "copy", uri, f"{name}.raw")
    t.run("cmp", "a.raw", f"{name}.raw")
    t.pattern_file("new.raw", 4 << 20, seed=7)
    t.brep("nbd", "copy", "new.raw", uri)
    t.brep("nbd", "copy", uri, f"{name}-2.raw")
    t.run("cmp", "new.raw", f"{name}-2.raw")


brep_iotest.main(run)
