"""One secondary process for two primaries: each group has its own checkpoints, failover and restart.

Seen to fail with: every client served by the first group.
"""

import brep_iotest
from brep_pair import Writer, snapshot


def run(t):
    for file in ("pw.raw", "sw.raw", "pd.raw", "sd.raw"):
        t.qemu_img("create", "-f", "raw", file, "8M")
    config = t.dir / "groups.toml"
    config.write_text(f"""listen = "{t.uri('s.sock')}"

[group.web]
disk = ["vda=sw.raw"]
state-dir = "web"
name = "beta"

[group.db]
disk = ["vda=sd.raw"]
state-dir = "db"
name = "beta"
""")
    t.log(t.brep("secondaries", config, "--check").stdout)
    wrong = t.brep("secondaries", write(t, config, "disk = ", "disc = "), "--check", code=2)
    t.expect("wrong.toml:4: disc: no option" in wrong.stderr, wrong.describe())
    t.log("a fault in the file is told with its line")

    start = lambda: t.brep_daemon(
        "secondary", "secondaries", config,
        ready=lambda: all(t.listens(f"{group}/control.sock") for group in ("web", "db"))
        and t.listens("s.sock"))
    secondary = start()

    def primary(group, file):
        return t.brep_daemon(
            group, "primary", "--name", group, "--state-dir", f"p-{group}", "--disk",
            f"vda={file}", "--peer", t.uri("s.sock", group), "--guest-listen",
            t.uri(f"{group}.sock"), "--checkpoint-interval", "off",
            ready=lambda: t.listens(f"p-{group}/control.sock"))

    ask = lambda state_dir, *words, **options: t.brep(
        *words, "--control", f"{state_dir}/control.sock", **options)
    status = lambda state_dir: ask(state_dir, "status", "--json").json
    in_sync = lambda group: t.wait_until(
        lambda: status(f"p-{group}")["disks"][0]["state"] == "in-sync"
        and status(group)["promotable"], f"{group} is in sync", 20)

    web, db = primary("web", "pw.raw"), primary("db", "pd.raw")
    in_sync("web")
    in_sync("db")
    guests = {group: Writer(t, t.uri(f"{group}.sock", "vda")) for group in ("web", "db")}
    t.expect(guests["web"].write(50) and guests["db"].write(30), "both guests write")
    before = status("db")["checkpoint"]
    ask("p-web", "checkpoint")
    t.equal(status("db")["checkpoint"], before, "the other group's checkpoint")
    wanted = snapshot(t, t.uri("web.sock", "vda"), "wanted.raw")
    t.expect(guests["web"].write(5), "the guest writes")
    t.log("checkpoints are each group's own")

    # Nobody else gets in, and hears no names.
    for group, what in (("mail", 'no group "mail" is served here'), ("", "several groups")):
        stranger = t.brep_daemon(
            "stranger", "primary", "--name", "x", "--state-dir", f"x{group}", "--disk",
            "vda=wanted.raw", "--peer", t.uri("s.sock", group), "--guest-listen",
            t.uri("x.sock"), ready=lambda: t.listens(f"x{group}/control.sock"))
        t.wait_until(lambda: what in (status(f"x{group}")["reason"] or ""), what)
        t.expect("web" not in status(f"x{group}")["reason"], "no other group is named")
        stranger.stop()
    t.qemu_img("info", "-f", "raw", t.uri("s.sock", "web/vda"), code=1)
    t.log("strangers are refused")

    # One is promoted, the other goes on.
    guests["web"].end()
    web.kill9()
    ask("web", "failover")
    t.equal(snapshot(t, t.uri("s.sock", "web/vda"), "now.raw"), wanted, "web/vda")
    t.qemu_io(t.uri("s.sock", "web/vda"), "write -P 7 4M 64k")
    t.expect(guests["db"].write(30), "the other guest goes on")
    ask("p-db", "checkpoint")
    t.equal(status("p-db")["link"], "connected", "the other pair")
    t.log("one group is promoted, and served at the same address; the other goes on")

    # A group that is stopped does not stop the others.
    ask("web", "stop")
    t.expect(guests["db"].write(30), "the other guest goes on")
    ask("p-db", "checkpoint")
    t.qemu_img("info", "-f", "raw", t.uri("s.sock", "web/vda"), code=1)
    t.log("one group is stopped; the other goes on")

    secondary.kill9()
    secondary = start()
    in_sync("db")
    t.qemu_io(t.uri("s.sock", "web/vda"), "read -P 7 4M 64k")
    t.expect(guests["db"].write(10), "the guest writes")
    guests["db"].end()
    ask("p-db", "checkpoint")
    t.equal(t.sha256("sd.raw"), snapshot(t, t.uri("db.sock", "vda"), "db.raw"), "db")
    db.stop()
    secondary.stop()
    t.log("after a kill both are what they were")


def write(t, config, old, new):
    wrong = t.dir / "wrong.toml"
    wrong.write_text(config.read_text().replace(old, new, 1))
    return wrong


brep_iotest.main(run)
