"""A strict S3 server for tests: standard library only, 127.0.0.1, path style.

    with S3Server(folder) as s3: ... s3.url, s3.env(), s3.log, s3.fault(...), s3.objects("bucket"), s3.uploads("bucket")

What it holds to (each checked against a real server, Ceph RGW, by s3_contract.py): AWS signature 4 of every request and
of its body, also of aws-chunked bodies; ranges (206, 416); If-Match, If-None-Match on GET, PUT and
CompleteMultipartUpload; x-amz-copy-source-if-match; CRC32, CRC32C, SHA-1, SHA-256, CRC64NVME and MD5 of bodies; parts
of at least 5 MiB but the last, at most 10,000, ascending, with their ETags; an upload is invisible until it is
completed; pages of 1,000 in lists; copies of at most 5 GiB; UploadPartCopy with closed ranges only.

The log has one dict a request: op, bucket, key, status, in (body bytes received), out (body bytes sent), copied (bytes
that the server copied by itself), range, query, fault, t. Secrets never enter it; headers stay in `seen_headers` for
checks of what a client sends where.

Faults: dicts with `op` (regular expression on the operation), `key` (on the key), `times`, `skip`, and one `kind`:
  status     answer `code`/`error` (503 SlowDown by default), before the operation
  reset      close the connection before the operation, without an answer
  lost       do the operation, then close the connection without an answer
  truncate   announce the whole body, send `part` of it (0.5), close the connection
  whole      ignore the Range header, answer 200 with everything
  shifted    send other bytes of the same object, same length and headers
  flip       flip one bit of what is sent
  error200   answer 200 whose body is an <Error> document (what S3 may do on CompleteMultipartUpload and copies)
  slow       wait `seconds` before the answer
  call       call `function(server)` before the operation, then go on
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
from contextlib import suppress
from http.server import ThreadingHTTPServer

from s3_operations import Operations
from s3_values import Object
from typing_extensions import Self


class S3Server:
    """See the top of the file."""

    def __init__(
        self,
        folder: str | None = None,
        *,
        port: int = 0,
        buckets: tuple[str, ...] = ("models",),
        key: str = "AKIDCHECKCHECKCHECK1",
        secret: str = "secretSECRETsecret/SECRETsecret+SECRET00",
        token: str | None = None,
        region: str = "us-east-1",
    ) -> None:
        self._own = folder is None
        self.folder = folder or tempfile.mkdtemp(prefix="s3-server-")
        os.makedirs(self.folder, exist_ok=True)
        self.key, self.secret, self.token, self.region = key, secret, token, region
        self.buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets}
        self.multiparts: dict[str, dict] = {}
        self.ignores: set[str] = set()  # headers that are as if they had not come, as with stores that know less
        self.has_other_etags = False  # ETags that are not MD5 sums, as where objects are encrypted with a key of KMS
        self.denied: set[tuple[str, str]] = set()  # (operation, bucket) answered with AccessDenied
        self.log: list[dict] = []
        self.seen_headers: list[dict[str, str]] = []
        self.faults: list[dict] = []
        self.lock = threading.RLock()
        self._number = self.generation = 0
        handler = type("Handler", (Operations,), {"s3": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._server.request_queue_size = 128
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)

    def etag(self, plain: str) -> str:
        """The ETag of an object, from the one that is documented for it."""
        return hashlib.sha256(plain.encode()).hexdigest()[:32] + plain[32:] if self.has_other_etags else plain

    def reset(self) -> None:
        """As it was when it was made, with empty buckets."""
        with self.lock:
            self.generation += 1
            for keys in self.buckets.values():
                keys.clear()
            self.has_other_etags = False
            for held in (self.multiparts, self.denied, self.ignores, self.log, self.seen_headers, self.faults):
                held.clear()
            for name in os.listdir(self.folder):
                with suppress(FileNotFoundError):  # a request of the test before may end only now
                    os.unlink(os.path.join(self.folder, name))

    def env(self) -> dict[str, str]:
        """What a client is told; nothing else of AWS stands in its environment."""
        told = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ALLOW_HTTP": "true",
        }
        return {**told, **({"AWS_SESSION_TOKEN": self.token} if self.token else {})}

    def fault(self, **fault: object) -> dict:
        self.faults.append({"op": ".*", "key": ".*", "times": 1, "skip": 0, **fault})
        return self.faults[-1]

    def put(self, bucket: str, key: str, data: bytes) -> None:
        path = self.new_path()
        with open(path, "wb") as file:
            file.write(data)
        with self.lock:
            self.buckets[bucket][key] = Object(path, len(data), hashlib.md5(data).hexdigest(), {})

    def put_folder(self, bucket: str, prefix: str, folder: str) -> None:
        for name in sorted(os.listdir(folder)):
            with open(os.path.join(folder, name), "rb") as file:
                self.put(bucket, f"{prefix}/{name}", file.read())

    def get(self, bucket: str, key: str) -> bytes:
        with open(self.buckets[bucket][key].path, "rb") as file:
            return file.read()

    def objects(self, bucket: str, prefix: str = "") -> dict[str, int]:
        return {key: one.nbytes for key, one in sorted(self.buckets[bucket].items()) if key.startswith(prefix)}

    def uploads(self, bucket: str, prefix: str = "") -> list[str]:
        return [
            one["key"] for one in self.multiparts.values() if one["bucket"] == bucket and one["key"].startswith(prefix)
        ]

    def moved(self, since: int = 0, **match: str) -> dict[str, int]:
        """Sums of bytes and requests of the log from entry `since` on."""
        with self.lock:
            rows = [row for row in self.log[since:] if all(re.search(v, str(row[k])) for k, v in match.items())]
        return {"requests": len(rows), **{name: sum(row[name] for row in rows) for name in ("in", "out", "copied")}}

    def new_path(self) -> str:
        with self.lock:
            self._number += 1
            return os.path.join(self.folder, f"{self._number:08}")

    def take_fault(self, op: str, key: str) -> dict | None:
        with self.lock:
            for fault in self.faults:
                if fault["times"] and re.search(fault["op"], op) and re.search(fault["key"], key):
                    if fault["skip"]:
                        fault["skip"] -= 1
                        continue
                    fault["times"] -= 1
                    return fault
        return None
