"""An error at the n-th of many requests in flight, read or write, is never lost: exit 1, told where.

Seen to fail with: the error of a worker dropped unless it is the last one to end.
"""

import os
import re

import brep_iotest

PIECE = 64 << 10
PIECES = 12
FAILING = {"read": "pread", "write": "pwrite"}


def run(t):
    t.require("nbdkit")
    t.pattern_file("a.raw", PIECES * PIECE)
    for side, call in FAILING.items():
        for n in range(1, PIECES + 1):
            error(t, side, call, n)
    t.log("every error: told")
    flush(t)
    lost(t)


def serve(t, side, call, n):
    """Serves in memory; the n-th call of one kind fails, those around it take a little time."""
    script = f"""
case "$1" in
  get_size) echo {PIECES * PIECE} ;;
  can_write|can_multi_conn|can_flush) exit 0 ;;
  thread_model) echo parallel ;;
  pread|pwrite|flush)
    if [ $1 = pwrite ]; then cat > /dev/null; fi
    if [ $1 = {call} ]; then
      ( flock 9; echo x >&9; count=$(wc -l < {t.dir}/count); [ $count -ne {n} ] ) 9>>{t.dir}/count ||
        {{ echo "EIO the {n}th" >&2; exit 1; }}
      sleep 0.002
    fi
    if [ $1 = pread ]; then head -c $3 /dev/zero | tr '\\0' 'a'; fi ;;
  *) exit 2 ;;
esac
"""
    (t.dir / "plugin.sh").write_text("#!/bin/sh\n" + script)
    (t.dir / "plugin.sh").chmod(0o755)
    (t.dir / "count").unlink(missing_ok=True)
    (t.dir / "count").touch()
    socket = f"{side}.sock"
    daemon = t.daemon(f"{side}-{n}", "nbdkit", "-f", "-U", t.dir / socket, "sh", "plugin.sh",
                      ready=lambda: t.listens(socket))
    return daemon, t.uri(socket)


def end(t, server, side):
    """nbdkit leaves its socket behind."""
    server.stop(code=None)
    (t.dir / f"{side}.sock").unlink()


def error(t, side, call, n):
    server, uri = serve(t, side, call, n)
    places = [uri, "copy.raw"] if side == "read" else ["a.raw", uri]
    result = t.brep("nbd", "copy", "--request-size", str(PIECE), "--requests", "8",
                    "--sparse", "0", *places, code=1)
    end(t, server, side)
    told = re.search(rf"{side} of (\d+) bytes at (\d+)", result.stderr)
    t.expect(told, f"{side} {n}: told where: {result.stderr}")
    t.equal(int(told[1]), PIECE, f"{side} {n}: the length")
    t.expect(int(told[2]) % PIECE == 0 and int(told[2]) < PIECES * PIECE, result.stderr)
    t.expect(not os.path.exists("copy.raw"), f"{side} {n}: half a copy is removed")


def flush(t):
    """The last thing that can fail."""
    server, uri = serve(t, "flush", "flush", 1)
    result = t.brep("nbd", "copy", "a.raw", uri, code=1)
    t.expect("flush" in result.stderr, result.stderr)
    t.brep("nbd", "copy", "--no-flush", "a.raw", uri)
    end(t, server, "flush")
    t.log("flush: told")


def lost(t):
    """The server goes away in the middle."""
    server = t.daemon("lost", "nbdkit", "-f", "-U", t.dir / "l.sock", "pattern", "64M",
                      "--filter=delay", "delay-read=50ms", ready=lambda: t.listens("l.sock"))
    copy = t.brep_daemon("copy", "nbd", "copy", t.uri("l.sock"), "copy.raw")
    t.wait_until(lambda: os.path.exists("copy.raw") and os.stat("copy.raw").st_blocks > 0,
                 "the copy has begun")
    server.kill9()
    t.equal(copy.wait(), 1, "exit code")
    t.expect("lost" in copy.log(), copy.log())
    t.expect(not os.path.exists("copy.raw"), "half a copy is removed")
    t.log("lost server: told")


brep_iotest.main(run)
