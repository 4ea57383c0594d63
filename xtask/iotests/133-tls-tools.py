"""`brep nbd serve` inside TLS, with the tools of others and our own; URIs with certificates.

Seen to fail with: a URI that demands TLS taken for one that does not.
"""

import brep_iotest


def run(t):
    t.require("nbdinfo", "nbdcopy")
    t.brep("tls", "init", "pki", "beta", "guest")
    t.pattern_file("d.raw", 4 << 20)
    port = t.free_port()
    t.brep_daemon("server", "nbd", "serve", "d.raw", "--listen", f"nbds://127.0.0.1:{port}",
                  "--export", "vda", "--tls-dir", "pki/beta", "--tls-allow", "CN=guest",
                  ready=lambda: t.listens_tcp(port))
    server = f"127.0.0.1:{port}"
    guest = f"nbds://{server}/vda?tls-certificates={t.dir}/pki/guest"

    t.log(t.run("nbdinfo", "--size", guest).stdout)
    t.run("nbdcopy", guest, "copy.raw")
    t.run("cmp", "d.raw", "copy.raw")
    t.run("nbdinfo", "--size", f"nbd://{server}/vda", code=1)
    t.run("nbdinfo", "--size", f"nbds://{server}/vda?tls-certificates={t.dir}/pki/beta", code=1)
    t.log("libnbd: copied inside TLS by the one that is on the list")

    said = t.brep("nbd", "info", f"nbds://{server}/vda", "--tls-dir", "pki/guest", "--json").json
    t.log(said["exports"][0]["size"])
    t.brep("image", "compare", "-f", "raw", "-F", "raw", "copy.raw", guest)
    t.log_brep("nbd", "info", f"nbds://{server}/vda")
    t.log_brep("nbd", "info", f"nbd://{server}/vda")
    t.log_brep("image", "info", f"nbds://{server}/vda?tls-certificates=pki/beta")
    t.log_brep("nbd", "info", f"nbds://{server}/vda?tls-verify-peer=0&tls-certificates=pki/guest")
    t.log_brep("nbd", "info",
               f"nbds://{server}/vda?tls-hostname=alpha&tls-certificates=pki/guest")


brep_iotest.main(run)
