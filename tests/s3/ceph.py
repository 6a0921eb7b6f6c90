"""Ceph's S3 service from Debian's packages, unpacked into a folder that is kept, started without being installed.

The packages are those of `apt-get download`; nothing is installed, and nothing needs root. One monitor, one OSD in
memory, one gateway, on 127.0.0.1, for as long as the block lasts.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PACKAGES = ("radosgw", "ceph-mon", "ceph-osd", "ceph-common")
KEY, SECRET = "CEPHCEPHCEPHCEPHCEPH", "cephcephcephcephcephcephcephcephcephceph"
_CONFIG = """[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
ms mon service mode = crc
ms mon cluster mode = crc
ms client mode = crc
ms service mode = crc
ms cluster mode = crc
paxos propose interval = 0.05
paxos min wait = 0.01
mon allow pool size one = true
mon data avail crit = 1
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 6442450944
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 2
osd pool default pgp num = 2
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd class dir = {libraries}/rados-classes
erasure code dir = {libraries}/ceph/erasure-code
plugin dir = {libraries}/ceph
run dir = {folder}/run
admin socket = {folder}/run/$name.$pid.asok
pid file =
log file = {folder}/log/$name.log
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}/rgw
rgw enable usage log = false
rgw max chunk size = 4194304
"""
# The command-line tool of Ceph needs bindings for the system's Python; the C library alone takes commands as well.
_COMMAND = """
import ctypes, sys
lib = ctypes.CDLL("librados.so.2")
cluster = ctypes.c_void_p()
assert lib.rados_create(ctypes.byref(cluster), None) == 0
assert lib.rados_conf_read_file(cluster, sys.argv[1].encode()) == 0
assert lib.rados_connect(cluster) == 0
command = (ctypes.c_char_p * 1)(sys.argv[2].encode())
out, said = ctypes.c_char_p(), ctypes.c_char_p()
sizes = ctypes.c_size_t(), ctypes.c_size_t()
code = lib.rados_mon_command(cluster, command, 1, b"", 0, ctypes.byref(out), ctypes.byref(sizes[0]),
                             ctypes.byref(said), ctypes.byref(sizes[1]))
print(code, said.value)
sys.exit(code != 0)
"""


def packages_folder() -> Path:
    """Where the packages are unpacked: LORAFORMAT_CEPH, or a folder in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("LORAFORMAT_CEPH", cache / "loraformat-ceph"))


def fetch(folder: Path) -> None:
    """Download and unpack the packages, where that is not done yet: 70 MB, 260 MB unpacked."""
    if (folder / "tree" / "usr" / "bin" / "radosgw").exists():
        return
    (folder / "packages").mkdir(parents=True, exist_ok=True)
    planned = subprocess.run(
        ["apt-get", "install", "-s", "--no-install-recommends", *PACKAGES], capture_output=True, text=True, check=True
    )
    names = [line.split()[1] for line in planned.stdout.splitlines() if line.startswith("Inst ")]
    subprocess.run(["apt-get", "download", "-qq", *names], cwd=folder / "packages", check=True)
    for package in sorted((folder / "packages").glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(folder / "tree")], check=True)


@contextmanager
def ceph(folder: Path, tree: Path) -> Iterator[dict[str, str]]:
    """A running service; its AWS_ variables.

    Args:
        folder: empty; for data and logs.
        tree: the unpacked packages.
    """
    libraries = next(tree.glob("usr/lib/*-linux-gnu*"))
    paths = f"{libraries}:{libraries}/ceph:{tree}/lib/{libraries.name}"
    env = {**os.environ, "LD_LIBRARY_PATH": paths}
    for name in ("mon", "osd", "rgw", "run", "log"):
        (folder / name).mkdir()
    v2, v1, port = _free_ports(3)
    fsid, config = str(uuid.uuid4()), folder / "ceph.conf"
    values = {"fsid": fsid, "v2": v2, "v1": v1, "port": port, "folder": folder, "libraries": libraries}
    config.write_text(_CONFIG.format(**values))

    def run(name: str, *arguments: str) -> None:
        command = [str(tree / "usr" / "bin" / name), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, (command, done.stdout[-1000:], done.stderr[-3000:])

    with ExitStack() as stack:

        def start(name: str, *arguments: str) -> None:
            command = [str(tree / "usr" / "bin" / name), "-c", str(config), "-f", *arguments]
            log = stack.enter_context((folder / "log" / f"{name}.out").open("w"))
            stack.callback(_end, subprocess.Popen(command, env=env, stdout=log, stderr=log))

        address = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
        run("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", address, str(folder / "monmap"))
        run("ceph-mon", "-c", str(config), "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"))
        start("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        command = f'{{"prefix": "osd new", "uuid": "{osd}"}}'
        subprocess.run([sys.executable, "-c", _COMMAND, str(config), command], env=env, check=True, timeout=120)
        run("ceph-osd", "-c", str(config), "--mkfs", "-i", "0", "--osd-uuid", osd)
        start("ceph-osd", "-i", "0")
        user = ("--uid=test", "--display-name=test", f"--access-key={KEY}", f"--secret={SECRET}")
        run("radosgw-admin", "-c", str(config), "user", "create", *user)
        start("radosgw", "-n", "client.rgw.a")
        url = f"http://127.0.0.1:{port}"
        _wait_for(url)
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_for(url: str) -> None:
    for _ in range(600):
        with suppress(OSError), urllib.request.urlopen(url):
            return
        time.sleep(0.2)
    raise TimeoutError(url)
