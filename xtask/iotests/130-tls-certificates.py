"""`brep tls` makes certificates that QEMU accepts in both roles, for their owner's eyes only, and
never writes over any.

Seen to fail with: certificates with a key usage that does not permit signatures.
"""

import os
import stat

import brep_iotest


def run(t):
    t.log_brep("tls", "init", "pki", "alpha")
    t.log_brep("tls", "issue", "pki", "beta", "--host", "beta.example.org", "--host", "10.0.0.2")
    t.log_brep("tls", "issue", "pki", "guest7", "--client", "--days", "30", "--out", "elsewhere")
    for directory in ("pki", "pki/alpha", "pki/beta", "elsewhere"):
        t.log(f"{directory}: {mode(t, directory)}")
        for file in sorted(os.listdir(t.dir / directory)):
            if file.endswith(".pem"):
                t.log(f"  {mode(t, directory + '/' + file)} {file}")

    t.log("--- nothing is overwritten, and nonsense is refused ---")
    before = t.sha256("pki/alpha/server-key.pem"), t.sha256("pki/ca-key.pem")
    t.log_brep("tls", "init", "pki")
    t.log_brep("tls", "init", "pki", "gamma")
    t.log_brep("tls", "issue", "pki", "alpha")
    t.log_brep("tls", "issue", "pki", "gamma", "--host", "no host")
    t.log_brep("tls", "issue", "nothing", "gamma")
    after = t.sha256("pki/alpha/server-key.pem"), t.sha256("pki/ca-key.pem")
    t.equal(before, after, "the keys that were there")
    t.expect(not (t.dir / "pki/gamma").exists(), "a refused command leaves nothing")

    t.log("--- QEMU takes them ---")
    t.qemu_img("create", "-f", "raw", "disk.raw", "1M")
    server = f"tls-creds-x509,id=tls0,endpoint=server,dir={t.dir}/pki/beta"
    port = t.free_port()
    t.daemon("qemu-nbd", "qemu-nbd", "-t", "-f", "raw", "-b", "127.0.0.1", "-p", str(port), "-x",
             "vda", "--object", server, "--tls-creds", "tls0", "disk.raw",
             ready=lambda: t.listens_tcp(port))
    for directory, role in (("pki/alpha", "server's and client's"), ("elsewhere", "client's")):
        client = f"tls-creds-x509,id=tls0,endpoint=client,dir={t.dir}/{directory}"
        image = f"driver=nbd,host=127.0.0.1,port={port},export=vda,tls-creds=tls0"
        t.run("qemu-io", "--object", client, "--image-opts", "-c", "write -P 7 0 64k", "-c",
              "read -P 7 0 64k", image)
        t.log(f"{role}: written and read")


def mode(t, path):
    return oct(stat.S_IMODE((t.dir / path).stat().st_mode))


brep_iotest.main(run)
