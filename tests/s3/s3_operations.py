"""The operations of the S3 server of the tests."""
# ruff: noqa: N802

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import time
import urllib.parse
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from s3_requests import Requests
from s3_values import BLOCK, MIN_PART, MOST_COPY, MOST_PARTS, PAGE, Object, Refused, iso, xml_error


class Operations(Requests):
    """A method an operation, named like it."""

    # buckets

    def _keys(self) -> dict[str, Object]:
        found = self.s3.buckets.get(self.bucket)
        if found is None:
            raise Refused(404, "NoSuchBucket")
        return found

    def _ListBuckets(self, _: object) -> None:
        names = "".join(
            f"<Bucket><Name>{name}</Name><CreationDate>2026-01-01T00:00:00.000Z</CreationDate></Bucket>"
            for name in self.s3.buckets
        )
        self._xml("ListAllMyBucketsResult", f"<Owner><ID>1</ID></Owner><Buckets>{names}</Buckets>")

    def _CreateBucket(self, _: object) -> None:
        if self.bucket in self.s3.buckets:
            raise Refused(409, "BucketAlreadyOwnedByYou")
        self.s3.buckets[self.bucket] = {}
        self._reply(200)

    def _HeadBucket(self, _: object) -> None:
        self._keys()
        self._reply(200, x_amz_bucket_region=self.s3.region)

    def _GetBucketLocation(self, _: object) -> None:
        self._keys()
        self._xml("LocationConstraint", "")

    def _ListObjects(self, _: object) -> None:
        query, keys = self.query, self._keys()
        prefix, slash = query.get("prefix", ""), query.get("delimiter", "")
        most = min(int(query.get("max-keys", PAGE)), PAGE)
        after = (
            base64.b64decode(query["continuation-token"]).decode()
            if "continuation-token" in query
            else query.get("start-after", query.get("marker", ""))
        )
        rows, seen, last, more = [], set(), "", False
        with self.s3.lock:
            listed = sorted((key, one) for key, one in keys.items() if key.startswith(prefix))
        for key, one in listed:
            folder = (
                prefix + key[len(prefix) :].split(slash)[0] + slash if slash and slash in key[len(prefix) :] else None
            )
            if key <= after or (folder and (folder in seen or folder <= after)):
                continue
            if len(rows) == most:
                more = True
                break
            last = folder or key
            if folder:
                seen.add(folder)
                rows.append(f"<CommonPrefixes><Prefix>{self._shown(folder)}</Prefix></CommonPrefixes>")
            else:
                rows.append(
                    f"<Contents><Key>{self._shown(key)}</Key><LastModified>{iso(one.time)}</LastModified><ETag>&quot;{one.etag}&quot;</ETag><Size>{one.nbytes}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                )
        token = (
            f"<NextContinuationToken>{base64.b64encode(last.encode()).decode()}</NextContinuationToken>" if more else ""
        )
        coded = "<EncodingType>url</EncodingType>" if query.get("encoding-type") == "url" else ""
        self._xml(
            "ListBucketResult",
            f"<Name>{self.bucket}</Name><Prefix>{self._shown(prefix)}</Prefix><KeyCount>{len(rows)}</KeyCount><MaxKeys>{most}</MaxKeys>{coded}<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(rows)}",
        )

    def _shown(self, key: str) -> str:
        return urllib.parse.quote(key, safe="/") if self.query.get("encoding-type") == "url" else escape(key)

    def _DeleteObjects(self, body: dict) -> None:
        keys = self._keys()
        with open(body["path"], "rb") as file:
            names = [node.text or "" for node in ET.parse(file).iter() if node.tag.endswith("Key")]
        with self.s3.lock:
            for name in names:
                self._drop(keys.pop(name, None))
        self._xml("DeleteResult", "".join(f"<Deleted><Key>{escape(name)}</Key></Deleted>" for name in names))

    # objects

    def _object(self) -> Object:
        found = self._keys().get(self.object_key)
        if found is None:
            raise Refused(404, "NoSuchKey")
        head = self.headers
        if head.get("If-Match") and head["If-Match"].strip('"') not in ("*", found.etag):
            raise Refused(412, "PreconditionFailed")
        if head.get("If-None-Match") and head["If-None-Match"].strip('"') in ("*", found.etag):
            raise Refused(304, "NotModified")
        return found

    def _HeadObject(self, _: object) -> None:
        self._GetObject(_)

    def _GetObject(self, _: object) -> None:
        one = self._object()
        first, stop, status, extra = 0, one.nbytes, 200, {}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked and (asked[1] or asked[2]) and not (self.fault and self.fault["kind"] == "whole"):
            if asked[1]:
                first, stop = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else one.nbytes, one.nbytes)
            else:
                first = max(0, one.nbytes - int(asked[2]))
            if first >= one.nbytes or first >= stop:
                body = xml_error("InvalidRange", "not satisfiable")
                self._reply(416, body, Content_Range=f"bytes */{one.nbytes}")
                return
            status, extra = 206, {"Content-Range": f"bytes {first}-{stop - 1}/{one.nbytes}"}
        self.row["status"] = status
        self.send_response(status)
        for name, value in {
            **one.headers,
            **extra,
            "ETag": f'"{one.etag}"',
            "Accept-Ranges": "bytes",
            "Content-Length": str(stop - first),
            "Last-Modified": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(one.time)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        kind = self.fault and self.fault["kind"]
        left = int((stop - first) * self.fault.get("part", 0.5)) if kind == "truncate" else stop - first
        if kind == "shifted":
            first = (
                max(0, min(first + 64, one.nbytes - left)) if first + 64 + left <= one.nbytes else max(0, first - 64)
            )
        with open(one.path, "rb") as file:
            file.seek(first)
            flipped = kind != "flip"
            while left > 0:
                data = file.read(min(left, BLOCK))
                if not flipped:
                    middle = len(data) // 2
                    data, flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], True
                self.wfile.write(data)
                self.row["out"] += len(data)
                left -= len(data)
        self.wfile.flush()
        if kind == "truncate":
            self._cut()

    def _conditions(self) -> None:
        """Those of a write, on what stands at the key."""
        now, head = self._keys().get(self.object_key), self.headers
        if head.get("If-None-Match") == "*" and now is not None:
            raise Refused(412, "PreconditionFailed")
        if head.get("If-Match") and (now is None or head["If-Match"].strip('"') != now.etag):
            raise Refused(412 if now else 404, "PreconditionFailed" if now else "NoSuchKey")

    def _drop(self, one: Object | None) -> None:
        if one is not None and os.path.exists(one.path):
            os.unlink(one.path)

    def _keep(self, one: Object) -> None:
        keys = self._keys()
        self._drop(keys.get(self.object_key))
        keys[self.object_key] = one

    def _PutObject(self, body: dict) -> None:
        with self.s3.lock:
            self._conditions()
            os.rename(body["path"], kept := self.s3.new_path())
            etag = self.s3.etag(body["md5"])
            self._keep(Object(kept, body["nbytes"], etag, self._kept_headers()))
        self._reply(200, ETag=f'"{etag}"')

    def _kept_headers(self) -> dict[str, str]:
        return {
            name: value
            for name, value in self.headers.items()
            if name.lower().startswith("x-amz-meta-") or name.lower() == "content-type"
        }

    def _source(self) -> tuple[Object, int, int]:
        bucket, _, key = (
            urllib.parse.unquote(self.headers["x-amz-copy-source"].split("?versionId")[0]).lstrip("/").partition("/")
        )
        if bucket not in self.s3.buckets:
            raise Refused(404, "NoSuchBucket")
        if ("GetObject", bucket) in self.s3.denied:
            raise Refused(403, "AccessDenied")
        one = self.s3.buckets[bucket].get(key)
        if one is None:
            raise Refused(404, "NoSuchKey")
        match = self.headers.get("x-amz-copy-source-if-match")
        if match and match.strip('"') != one.etag:
            raise Refused(412, "PreconditionFailed")
        first, stop = 0, one.nbytes
        if asked := self.headers.get("x-amz-copy-source-range"):
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
            if not found or int(found[2]) >= one.nbytes or int(found[1]) > int(found[2]):
                raise Refused(400, "InvalidArgument", "the range is not inside the source")
            first, stop = int(found[1]), int(found[2]) + 1
        if stop - first > MOST_COPY:
            raise Refused(400, "InvalidRequest", "the copy is too large")
        return one, first, stop

    def _copied(self) -> tuple[str, int, str]:
        one, first, stop = self._source()
        path, md5, left = self.s3.new_path(), hashlib.md5(), stop - first
        with open(one.path, "rb") as source, open(path, "wb") as target:
            source.seek(first)
            while left:
                data = source.read(min(left, BLOCK))
                target.write(data)
                md5.update(data)
                left -= len(data)
        self.row["copied"] = stop - first
        return path, stop - first, md5.hexdigest()

    def _CopyObject(self, _: object) -> None:
        self._keys()
        path, nbytes, etag = self._copied()
        with self.s3.lock:
            self._conditions()
            self._keep(Object(path, nbytes, etag, self._kept_headers()))
        self._xml("CopyObjectResult", f"<LastModified>{iso(time.time())}</LastModified><ETag>&quot;{etag}&quot;</ETag>")

    def _DeleteObject(self, _: object) -> None:
        keys = self._keys()
        with self.s3.lock:
            self._drop(keys.pop(self.object_key, None))
        self._reply(204)

    # uploads of several parts

    def _upload(self) -> dict:
        self._keys()
        found = self.s3.multiparts.get(self.query.get("uploadId", ""))
        if found is None or (found["bucket"], found["key"]) != (self.bucket, self.object_key):
            raise Refused(404, "NoSuchUpload")
        return found

    def _CreateMultipartUpload(self, _: object) -> None:
        self._keys()
        number = hashlib.sha256(os.urandom(16)).hexdigest()[:32]
        with self.s3.lock:
            self.s3.multiparts[number] = {
                "bucket": self.bucket,
                "key": self.object_key,
                "parts": {},
                "headers": self._kept_headers(),
                "time": time.time(),
            }
        self._xml(
            "InitiateMultipartUploadResult",
            f"<Bucket>{self.bucket}</Bucket><Key>{escape(self.object_key)}</Key><UploadId>{number}</UploadId>",
        )

    def _part(self, path: str, nbytes: int, etag: str) -> None:
        number = int(self.query["partNumber"])
        if not 1 <= number <= MOST_PARTS:
            raise Refused(400, "InvalidArgument", "part numbers are 1 to 10000")
        with self.s3.lock:
            parts = self._upload()["parts"]
            self._drop(parts.get(number))
            parts[number] = Object(path, nbytes, etag, {})

    def _UploadPart(self, body: dict) -> None:
        self._upload()
        os.rename(body["path"], kept := self.s3.new_path())
        self._part(kept, body["nbytes"], body["md5"])
        self._reply(
            200, ETag=f'"{body["md5"]}"', **{f"x-amz-checksum-{name}": value for name, value in body["sums"].items()}
        )

    def _UploadPartCopy(self, _: object) -> None:
        self._upload()
        path, nbytes, etag = self._copied()
        self._part(path, nbytes, etag)
        self._xml("CopyPartResult", f"<LastModified>{iso(time.time())}</LastModified><ETag>&quot;{etag}&quot;</ETag>")

    def _ListParts(self, _: object) -> None:
        parts = sorted(self._upload()["parts"].items())
        after, most = (
            int(self.query.get("part-number-marker") or 0),
            min(int(self.query.get("max-parts") or PAGE), PAGE),
        )
        listed = [(number, one) for number, one in parts if number > after]
        rows = "".join(
            f"<Part><PartNumber>{number}</PartNumber><LastModified>{iso(one.time)}</LastModified><ETag>&quot;{one.etag}&quot;</ETag><Size>{one.nbytes}</Size></Part>"
            for number, one in listed[:most]
        )
        last = listed[:most][-1][0] if listed else 0
        self._xml(
            "ListPartsResult",
            f"<Bucket>{self.bucket}</Bucket><Key>{escape(self.object_key)}</Key>"
            f"<UploadId>{self.query['uploadId']}</UploadId><NextPartNumberMarker>{last}</NextPartNumberMarker>"
            f"<MaxParts>{most}</MaxParts><IsTruncated>{str(len(listed) > most).lower()}</IsTruncated>{rows}",
        )

    def _ListMultipartUploads(self, _: object) -> None:
        self._keys()
        prefix = self.query.get("prefix", "")
        with self.s3.lock:
            found = sorted(
                (one["key"], number, one["time"])
                for number, one in self.s3.multiparts.items()
                if one["bucket"] == self.bucket and one["key"].startswith(prefix)
            )
        rows = "".join(
            f"<Upload><Key>{escape(key)}</Key><UploadId>{number}</UploadId><Initiated>{iso(at)}</Initiated></Upload>"
            for key, number, at in found[:PAGE]
        )
        self._xml(
            "ListMultipartUploadsResult",
            f"<Bucket>{self.bucket}</Bucket><Prefix>{escape(prefix)}</Prefix><MaxUploads>{PAGE}</MaxUploads><IsTruncated>false</IsTruncated>{rows}",
        )

    def _AbortMultipartUpload(self, _: object) -> None:
        with self.s3.lock:
            upload = self._upload()
            del self.s3.multiparts[self.query["uploadId"]]
            for one in upload["parts"].values():
                self._drop(one)
        self._reply(204)

    def _CompleteMultipartUpload(self, body: dict) -> None:
        with open(body["path"], "rb") as file:
            tree = ET.parse(file)
        named = []
        for node in tree.iter():
            if node.tag.rpartition("}")[2] == "Part":
                values = {child.tag.rpartition("}")[2]: (child.text or "") for child in node}
                named.append((int(values["PartNumber"]), values["ETag"].strip('"')))
        with self.s3.lock:
            upload = self._upload()
            if not named:
                raise Refused(400, "MalformedXML")
            if [n for n, _ in named] != sorted({n for n, _ in named}):
                raise Refused(400, "InvalidPartOrder")
            parts = [upload["parts"].get(number) for number, _ in named]
            if any(part is None or part.etag != etag for part, (_, etag) in zip(parts, named, strict=True)):
                raise Refused(400, "InvalidPart")
            if any(part.nbytes < MIN_PART for part in parts[:-1]):
                raise Refused(400, "EntityTooSmall")
            self._conditions()
            path, md5 = self.s3.new_path(), hashlib.md5()
            with open(path, "wb") as target:
                for part in parts:
                    md5.update(bytes.fromhex(part.etag))
                    with open(part.path, "rb") as source:
                        shutil.copyfileobj(source, target, BLOCK)
            etag = self.s3.etag(f"{md5.hexdigest()}-{len(parts)}")
            self._keep(Object(path, sum(part.nbytes for part in parts), etag, upload["headers"]))
            del self.s3.multiparts[self.query["uploadId"]]
            for one in upload["parts"].values():
                self._drop(one)
        self._xml(
            "CompleteMultipartUploadResult",
            f"<Location>{self.s3.url}{escape(self.path)}</Location><Bucket>{self.bucket}</Bucket><Key>{escape(self.object_key)}</Key><ETag>&quot;{etag}&quot;</ETag>",
        )
