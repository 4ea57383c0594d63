"""Two groups at one encrypted address, each for the primary whose certificate it names: neither gets into
the other's group, and after a failover only its own guests are let in.

Seen to fail with: a group that looks at nobody's certificate.
"""

import brep_iotest


def run(t):
    t.brep("tls", "init", "pki", "beta", "web", "db", "guest")
    for file in ("pw.raw", "sw.raw", "pd.raw", "sd.raw"):
        t.qemu_img("create", "-f", "raw", file, "8M")
    port = t.free_port()
    config = t.dir / "groups.toml"
    config.write_text(f"""listen = "nbds://localhost:{port}"
tls-dir = "pki/beta"

[group.web]
disk = ["vda=sw.raw"]
state-dir = "web"
name = "beta"
tls-peer = "CN=web"
tls-allow = ["CN=guest"]

[group.db]
disk = ["vda=sd.raw"]
state-dir = "db"
name = "beta"
tls-peer = "CN=db"
""")
    secondary = t.brep_daemon(
        "secondary", "secondaries", config,
        ready=lambda: all(t.listens(f"{group}/control.sock") for group in ("web", "db"))
        and t.listens_tcp(port))

    def primary(state_dir, certificate, group, file):
        return t.brep_daemon(
            state_dir, "primary", "--name", certificate, "--state-dir", state_dir, "--disk",
            f"vda={file}", "--peer", f"nbds://localhost:{port}/{group}", "--tls-dir",
            f"pki/{certificate}", "--tls-peer", "CN=beta", "--guest-listen",
            t.uri(f"{state_dir}.sock"), "--checkpoint-interval", "off",
            ready=lambda: t.listens(f"{state_dir}/control.sock"))

    status = lambda state_dir: t.brep(
        "status", "--json", "--control", f"{state_dir}/control.sock").json

    t.qemu_img("create", "-f", "raw", "x.raw", "8M")
    thief = primary("thief", "db", "web", "x.raw")
    t.wait_until(lambda: "CN=db" in (status("thief")["reason"] or ""), "a refusal that says why")
    t.expect(status("web")["link"] != "connected", "nobody is in")
    thief.stop()
    t.log("a group is not for the primary of another")

    for group, file in (("web", "pw.raw"), ("db", "pd.raw")):
        primary(f"p-{group}", group, group, file)
        t.wait_until(lambda: status(f"p-{group}")["disks"][0]["state"] == "in-sync"
                     and status(group)["promotable"], f"{group} is in sync", 20)
        t.equal(status(f"p-{group}")["tls"]["subject"], "CN=beta", "whom the primary talks to")
        t.equal(status(group)["tls"]["subject"], f"CN={group}", "whom the group talks to")
    t.qemu_io(t.uri("p-web.sock", "vda"), "write -P 7 0 1M", "flush")
    t.brep("checkpoint", "--control", "p-web/control.sock")
    t.log("both are in sync, and know with whom")

    t.brep("failover", "--control", "web/control.sock")
    t.equal(status("db")["link"], "connected", "the other group goes on")

    def open_as(certificate):
        options = (f"driver=nbd,host=localhost,port={port},export=web/vda,tls-creds=tls0")
        return t.run(
            t.which("qemu-io"), "--object",
            f"tls-creds-x509,id=tls0,endpoint=client,dir=pki/{certificate}", "--image-opts",
            "-c", "read -P 7 0 1M", f"{options}", code=None)

    t.wait_until(lambda: open_as("guest").code == 0, "its guest is served")
    t.expect(open_as("db").code != 0, "nobody else's")
    t.log("after a failover its own guests are let in, and nobody else")
    secondary.stop()


brep_iotest.main(run)
