"""One request to the S3 server of the tests: its body, its signature, and how it is answered."""

# ruff: noqa: N815, TRY301, C901
from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import socket
import struct
import time
import urllib.parse
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from typing import Any

from s3_values import BLOCK, SLOW_SUMS, SUMS, Refused, quoted, xml_error


class Requests(BaseHTTPRequestHandler):
    """What all operations share."""

    s3: Any
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    timeout = 60

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *_: object) -> None:
        return

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    # one request

    def _any(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        self.bucket, _, self.object_key = path.lstrip("/").partition("/")
        self.op = self._operation()
        self.row = {
            "op": self.op,
            "bucket": self.bucket,
            "key": self.object_key,
            "status": 0,
            "in": 0,
            "out": 0,
            "copied": 0,
            "range": self.headers.get("Range"),
            "query": {k: v for k, v in self.query.items() if not k.startswith("X-Amz")},
            "fault": None,
            "t": time.time(),
        }
        with self.s3.lock:
            self.s3.log.append(self.row)
            self.s3.seen_headers.append(dict(self.headers.items()))
        self.fault = self.s3.take_fault(self.op, self.object_key)
        self.row["fault"] = self.fault and self.fault["kind"]
        body = None
        try:
            if self.fault and self.fault["kind"] == "reset":
                self._cut()
                return None
            body = self._body()
            for name in self.s3.ignores:
                del self.headers[name]
            if self.fault and self.fault["kind"] == "status":
                raise Refused(self.fault.get("code", 503), self.fault.get("error", "SlowDown"), "injected")
            if self.fault and self.fault["kind"] == "slow":
                generation = self.s3.generation
                time.sleep(self.fault["seconds"])
                if self.s3.generation != generation:  # a process asked that was killed, in a test that is over
                    self._cut()
                    return None
            if self.fault and self.fault["kind"] == "call":
                self.fault["function"](self.s3)
            if (self.op, self.bucket) in self.s3.denied or ("*", self.bucket) in self.s3.denied:
                raise Refused(403, "AccessDenied")
            if self.fault and self.fault["kind"] == "error200":
                return self._reply(
                    200, xml_error("InternalError", "We encountered an internal error. Please try again.")
                )
            getattr(self, f"_{self.op}", self._unknown)(body)
        except Refused as refused:
            self._reply(refused.status, xml_error(refused.code, refused.message))
        finally:
            if body and os.path.exists(body["path"]):
                os.unlink(body["path"])

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

    def _operation(self) -> str:
        method, query, key = self.command, self.query, self.object_key
        if not self.bucket:
            return "ListBuckets"
        if not key:
            if method == "GET":
                return (
                    "ListMultipartUploads"
                    if "uploads" in query
                    else "GetBucketLocation"
                    if "location" in query
                    else "ListObjects"
                )
            return {"PUT": "CreateBucket", "HEAD": "HeadBucket", "DELETE": "DeleteBucket", "POST": "DeleteObjects"}.get(
                method, "Unknown"
            )
        if method == "POST":
            return "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload"
        copy = "Copy" if self.headers.get("x-amz-copy-source") else ""
        if method == "PUT":
            return f"UploadPart{copy}" if "partNumber" in query else "CopyObject" if copy else "PutObject"
        if method == "DELETE":
            return "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
        if method == "GET" and "uploadId" in query:
            return "ListParts"
        return "HeadObject" if method == "HEAD" else "GetObject"

    def _unknown(self, _: object) -> None:
        raise Refused(501, "NotImplemented")

    # bodies and signatures

    def _body(self) -> dict:
        """The body in a file, its signature and sums checked."""
        head, length = self.headers, int(self.headers.get("Content-Length") or 0)
        path, sha, md5 = self.s3.new_path(), hashlib.sha256(), hashlib.md5()
        chunked = "aws-chunked" in (head.get("Content-Encoding") or "") or (
            head.get("x-amz-content-sha256") or ""
        ).startswith("STREAMING")
        if head.get("Transfer-Encoding"):
            raise Refused(411, "MissingContentLength")
        size, trailers = 0, {}
        with open(path, "wb") as file:
            for data in self._chunks(length, trailers) if chunked else self._blocks(length):
                file.write(data)
                sha.update(data)
                md5.update(data)
                size += len(data)
        self.row["in"] = size
        body = {"path": path, "nbytes": size, "md5": md5.hexdigest()}
        try:
            self._check_signature(sha.hexdigest())
            if chunked and size != int(head.get("x-amz-decoded-content-length") or -1):
                raise Refused(400, "IncompleteBody")
            if head.get("Content-MD5") and base64.b64decode(head["Content-MD5"]).hex() != body["md5"]:
                raise Refused(400, "BadDigest")
            body["sums"] = self._check_sums(path, size, trailers)
        except Refused:
            os.unlink(path)
            raise
        return body

    def _blocks(self, length: int):
        while length:
            data = self.rfile.read(min(length, BLOCK))
            if not data:
                raise ConnectionResetError
            length -= len(data)
            yield data

    def _chunks(self, length: int, trailers: dict[str, str]):
        while True:
            size = int(self.rfile.readline().split(b";")[0], 16)
            if not size:
                break
            yield from self._blocks(size)
            self.rfile.readline()
        while line := self.rfile.readline().strip():
            name, _, value = line.decode().partition(":")
            trailers[name.lower()] = value.strip()

    def _check_sums(self, path: str, size: int, trailers: dict[str, str]) -> dict[str, str]:
        found = {}
        for name, make in SUMS.items():
            wanted = self.headers.get(f"x-amz-checksum-{name}") or trailers.get(f"x-amz-checksum-{name}")
            if not wanted:
                continue
            found[name] = wanted
            if name in ("crc32c", "crc64nvme") and size > SLOW_SUMS:
                continue
            total = make()
            with open(path, "rb") as file:
                while data := file.read(BLOCK):
                    total.update(data)
            if base64.b64encode(total.digest()).decode() != wanted:
                raise Refused(400, "BadDigest", f"the {name} does not match")
        return found

    def _check_signature(self, sha256: str) -> None:
        head, s3 = self.headers, self.s3
        auth = head.get("Authorization")
        if not auth:
            raise Refused(403, "AccessDenied", "not signed")
        found = re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=([^,/]+)/(\d{8})/([^,/]+)/s3/aws4_request, ?"
            r"SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})",
            auth,
        )
        if not found:
            raise Refused(400, "AuthorizationHeaderMalformed")
        key, day, region, signed, signature = found.groups()
        if key != s3.key:
            raise Refused(403, "InvalidAccessKeyId")
        if s3.token and head.get("x-amz-security-token") != s3.token:
            raise Refused(403, "InvalidToken" if head.get("x-amz-security-token") else "AccessDenied")
        if region != s3.region:
            raise Refused(400, "AuthorizationHeaderMalformed", f"the region is {s3.region}")
        date, content = head.get("x-amz-date") or "", head.get("x-amz-content-sha256") or ""
        when = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
        if abs((datetime.now(timezone.utc) - when).total_seconds()) > 900:
            raise Refused(403, "RequestTimeTooSkewed")
        if "host" not in signed.split(";"):
            raise Refused(403, "AccessDenied", "the host is not signed")
        query = "&".join(sorted(f"{quoted(k)}={quoted(v)}" for k, v in self.query.items()))
        names = signed.split(";")
        lines = "".join(f"{name}:{' '.join((head.get(name) or '').split())}\n" for name in names)
        raw = urllib.parse.urlsplit(self.path).path
        want = ""
        for path in (raw, urllib.parse.quote(urllib.parse.unquote(raw), safe="/-_.~")):
            request = "\n".join((self.command, path, query, lines, signed, content))
            text = "\n".join(
                (
                    "AWS4-HMAC-SHA256",
                    date,
                    f"{day}/{region}/s3/aws4_request",
                    hashlib.sha256(request.encode()).hexdigest(),
                )
            )
            sign = f"AWS4{s3.secret}".encode()
            for part in (day, region, "s3", "aws4_request"):
                sign = hmac.new(sign, part.encode(), hashlib.sha256).digest()
            want = hmac.new(sign, text.encode(), hashlib.sha256).hexdigest()
            if hmac.compare_digest(want, signature):
                break
        else:
            raise Refused(403, "SignatureDoesNotMatch")
        if re.fullmatch(r"[0-9a-f]{64}", content) and content != sha256:
            raise Refused(400, "XAmzContentSHA256Mismatch")

    # answers

    def _cut(self) -> None:
        self.close_connection = True
        self.row["status"] = -1
        try:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def _reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        if self.fault and self.fault["kind"] == "lost" and status < 300:
            self.row["fault"] = "lost"
            self._cut()
            return
        self.row["status"] = status
        self.send_response(status)
        self.send_header("x-amz-request-id", f"{len(self.s3.log):016X}")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if body:
            self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.row["out"] += len(body)
        self.wfile.flush()

    def _xml(self, name: str, content: str, **headers: str) -> None:
        self._reply(
            200,
            f'<?xml version="1.0" encoding="UTF-8"?>\n<{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{content}</{name}>'.encode(),
            **headers,
        )
