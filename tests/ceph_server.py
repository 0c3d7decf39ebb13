"""A real Ceph RadosGW with one monitor and one OSD in memory; needs the Debian packages ceph-mon, ceph-osd, radosgw."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, free_port

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
NO_CEPH = "no Ceph; install the packages ceph-mon, ceph-osd, ceph-common and radosgw"
_CONFIGURATION = """
[global]
fsid = {fsid}
mon initial members = a
mon host = {monitor}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 2147483648
run dir = {root}/run
log file = {root}/log/$name.log
admin socket = {root}/run/$name.asok
pid file = {root}/run/$name.pid
keyring = {root}/keyring
[mon.a]
mon data = {root}/mon
[osd.0]
osd data = {root}/osd
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {root}/rgw
rgw dynamic resharding = false
"""


def has_ceph() -> bool:
    """Return whether all programs are there."""
    return all(map(shutil.which, PROGRAMS))


@contextlib.contextmanager
def serving_ceph(root: Path) -> Iterator[S3Server]:
    """Serve S3 by Ceph from memory while it is open; it starts in about 15 s. Raises RuntimeError without Ceph."""
    if not has_ceph():
        raise RuntimeError(NO_CEPH)
    port, fsid = free_port(), str(uuid.uuid4())
    monitor = f"[v2:127.0.0.1:{free_port()},v1:127.0.0.1:{free_port()}]"
    for name in ("run", "log", "mon", "osd", "rgw"):
        (root / name).mkdir(parents=True, exist_ok=True)
    text = _CONFIGURATION.format(root=root, fsid=fsid, monitor=monitor, port=port)
    (root / "ceph.conf").write_text(text)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _start(root, fsid, monitor, daemons)
        yield S3Server(f"http://127.0.0.1:{port}")
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGKILL)  # nothing of it is kept
            daemon.wait()


def _start(root: Path, fsid: str, monitor: str, daemons: list[subprocess.Popen[bytes]]) -> None:
    configuration, osd = ("-c", str(root / "ceph.conf")), str(uuid.uuid4())
    keyring = str(root / "keyring")
    everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
    _run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    for name in ("client.admin", "client.rgw"):
        _run("ceph-authtool", keyring, "--gen-key", "-n", name, *everything)
    _run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitor, str(root / "monmap"))
    map_and_keys = ("--monmap", str(root / "monmap"), "--keyring", keyring)
    _run("ceph-mon", *configuration, "--mkfs", "-i", "a", *map_and_keys)
    daemons.append(_daemon("ceph-mon", *configuration, "-f", "-i", "a"))
    _run("ceph", *configuration, "osd", "new", osd)
    own = ("--no-mon-config", "--mkfs", "--mkkey", "--osd-uuid", osd, "--keyring", str(root / "osd" / "keyring"))
    _run("ceph-osd", *configuration, "-i", "0", *own)
    caps = ("osd", "allow *", "mon", "allow *")
    _run("ceph", *configuration, "auth", "add", "osd.0", *caps, "-i", str(root / "osd" / "keyring"))
    daemons.append(_daemon("ceph-osd", *configuration, "-f", "-i", "0", "--keyring", str(root / "osd" / "keyring")))
    daemons.append(_daemon("radosgw", *configuration, "-f", "-n", "client.rgw"))
    keys = (f"--access-key={ACCESS_KEY}", f"--secret={SECRET_KEY}")
    user = ("user", "create", "--uid=test", "--display-name=test", *keys)
    _run("radosgw-admin", *configuration, "-n", "client.rgw", *user, tries=60)


def _daemon(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _run(*command: str, tries: int = 1) -> None:
    for _ in range(tries):
        done = _finished(command)
        if done.returncode == 0:
            return
        time.sleep(0.5)
    raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-300:]}")


def _finished(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "LC_ALL": "C"}, check=False
    )
