#!/usr/bin/env python3
"""What a merge asks of an S3 server, as 32 questions to any server: which of them it answers as S3 does.

    python s3_contract.py --fake                          the server of s3_server.py
    AWS_ENDPOINT_URL=... AWS_ACCESS_KEY_ID=... ... python s3_contract.py      any other

Needs boto3. Exit 0: all as S3 does. A server that fails a question of the group "must" hides faults of a client.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import sys
import time
import uuid
import zlib

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

MIB = 1 << 20
QUESTIONS = []


def must(function):
    QUESTIONS.append(("must", function))
    return function


def should(function):
    QUESTIONS.append(("should", function))
    return function


class World:
    def __init__(self) -> None:
        plain = Config(retries={"max_attempts": 1}, s3={"addressing_style": "path"}, read_timeout=60)
        self.s3 = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], config=plain)
        self.bucket = f"contract-{uuid.uuid4().hex[:10]}"
        self.s3.create_bucket(Bucket=self.bucket)
        self.big = os.urandom(12 * MIB)
        self.put("big", self.big)
        self.etag = self.s3.head_object(Bucket=self.bucket, Key="big")["ETag"]

    def put(self, key, data, **more):
        return self.s3.put_object(Bucket=self.bucket, Key=key, Body=data, **more)

    def get(self, key, **more):
        return self.s3.get_object(Bucket=self.bucket, Key=key, **more)["Body"].read()

    def start(self, key):
        return self.s3.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"]

    def part(self, key, upload, number, data, **more):
        return self.s3.upload_part(Bucket=self.bucket, Key=key, UploadId=upload, PartNumber=number, Body=data, **more)[
            "ETag"
        ]

    def copy(self, key, upload, number, first, stop, source="big", **more):
        return self.s3.upload_part_copy(
            Bucket=self.bucket,
            Key=key,
            UploadId=upload,
            PartNumber=number,
            CopySource={"Bucket": self.bucket, "Key": source},
            CopySourceRange=f"bytes={first}-{stop - 1}",
            **more,
        )["CopyPartResult"]["ETag"]

    def complete(self, key, upload, etags, **more):
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in etags]
        return self.s3.complete_multipart_upload(
            Bucket=self.bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}, **more
        )

    def keys(self, prefix=""):
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [one["Key"] for page in pages for one in page.get("Contents", [])]

    def uploads(self):
        return [one["UploadId"] for one in self.s3.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])]


def refused(call, *codes):
    try:
        call()
    except ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        return code in codes or str(status) in codes or f"refused as {code} ({status})"
    return "accepted"


@must
def range_of_eight_bytes(w):
    answer = w.s3.get_object(Bucket=w.bucket, Key="big", Range="bytes=1000-1007")
    return answer["Body"].read() == w.big[1000:1008] and answer["ResponseMetadata"]["HTTPStatusCode"] == 206


@must
def range_is_quick(w):
    begin = time.time()
    for _ in range(10):
        w.get("big", Range="bytes=0-7")
    spent = (time.time() - begin) / 10
    return spent < 0.05 or f"{spent * 1000:.0f} ms"


@must
def range_behind_the_end(w):
    return refused(lambda: w.get("big", Range=f"bytes={len(w.big)}-{len(w.big) + 9}"), "InvalidRange", "416")


@must
def wrong_secret(w):
    other = boto3.client(
        "s3",
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        aws_access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key="wrong" * 8,
        config=Config(s3={"addressing_style": "path"}),
    )
    return refused(lambda: other.get_object(Bucket=w.bucket, Key="big"), "SignatureDoesNotMatch", "AccessDenied")


@must
def unknown_access_key(w):
    other = boto3.client(
        "s3",
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        aws_access_key_id="NOBODY",
        aws_secret_access_key="wrong" * 8,
        config=Config(s3={"addressing_style": "path"}),
    )
    return refused(lambda: other.get_object(Bucket=w.bucket, Key="big"), "InvalidAccessKeyId", "AccessDenied")


@must
def missing_bucket(w):
    return refused(lambda: w.s3.list_objects_v2(Bucket=f"{w.bucket}-none"), "NoSuchBucket")


@must
def missing_key(w):
    return refused(lambda: w.get("none"), "NoSuchKey")


@must
def body_with_wrong_md5(w):
    wrong = base64.b64encode(hashlib.md5(b"x").digest()).decode()
    return refused(lambda: w.put("md5", b"abc", ContentMD5=wrong), "BadDigest", "InvalidDigest")


@should
def body_with_wrong_crc32(w):
    wrong = base64.b64encode((zlib.crc32(b"x")).to_bytes(4, "big")).decode()
    return refused(
        lambda: w.put("crc", b"abc", ChecksumCRC32=wrong), "BadDigest", "InvalidRequest", "XAmzContentChecksumMismatch"
    )


@should
def body_with_wrong_sha256(w):
    wrong = base64.b64encode(hashlib.sha256(b"x").digest()).decode()
    return refused(
        lambda: w.put("sha", b"abc", ChecksumSHA256=wrong), "BadDigest", "InvalidRequest", "XAmzContentChecksumMismatch"
    )


@must
def create_only_once(w):
    w.put("once", b"1", IfNoneMatch="*")
    return (
        refused(lambda: w.put("once", b"2", IfNoneMatch="*"), "PreconditionFailed", "412") is True
        and w.get("once") == b"1"
    ) or "overwritten"


@should
def replace_only_what_was_seen(w):
    etag = w.put("seen", b"1")["ETag"]
    w.put("seen", b"2")
    return refused(lambda: w.put("seen", b"3", IfMatch=etag), "PreconditionFailed", "412")


@must
def get_only_what_was_seen(w):
    return refused(lambda: w.get("big", IfMatch='"0123456789abcdef0123456789abcdef"'), "PreconditionFailed", "412")


@must
def parts_are_joined(w):
    upload = w.start("joined")
    etags = [
        (1, w.part("joined", upload, 1, w.big[: 5 * MIB])),
        (2, w.copy("joined", upload, 2, 5 * MIB, 10 * MIB)),
        (3, w.part("joined", upload, 3, b"tail")),
    ]
    w.complete("joined", upload, etags)
    return w.get("joined") == w.big[: 10 * MIB] + b"tail"


@must
def parts_in_any_order(w):
    upload = w.start("order")
    second = w.part("order", upload, 7, b"tail")
    first = w.copy("order", upload, 3, 1, 5 * MIB + 1)
    w.complete("order", upload, [(3, first), (7, second)])
    return w.get("order") == w.big[1 : 5 * MIB + 1] + b"tail"


@must
def upload_is_invisible(w):
    upload = w.start("invisible")
    w.part("invisible", upload, 1, w.big[: 5 * MIB])
    seen = "invisible" in w.keys() or refused(lambda: w.get("invisible"), "NoSuchKey") is not True  # noqa: SIM118
    w.s3.abort_multipart_upload(Bucket=w.bucket, Key="invisible", UploadId=upload)
    return not seen


@must
def uploads_are_listed_and_aborted(w):
    upload = w.start("aborted")
    listed = upload in w.uploads()
    w.s3.abort_multipart_upload(Bucket=w.bucket, Key="aborted", UploadId=upload)
    return listed and upload not in w.uploads()


@must
def parts_are_listed(w):
    upload = w.start("listed")
    etag = w.part("listed", upload, 2, w.big[: 5 * MIB])
    found = w.s3.list_parts(Bucket=w.bucket, Key="listed", UploadId=upload)["Parts"]
    w.s3.abort_multipart_upload(Bucket=w.bucket, Key="listed", UploadId=upload)
    return [(one["PartNumber"], one["ETag"], one["Size"]) for one in found] == [(2, etag, 5 * MIB)]


@must
def upload_after_abort(w):
    upload = w.start("gone")
    w.s3.abort_multipart_upload(Bucket=w.bucket, Key="gone", UploadId=upload)
    return refused(lambda: w.part("gone", upload, 1, b"x"), "NoSuchUpload")


@must
def small_part_in_the_middle(w):
    upload = w.start("small")
    etags = [(1, w.part("small", upload, 1, b"small")), (2, w.part("small", upload, 2, b"tail"))]
    return refused(lambda: w.complete("small", upload, etags), "EntityTooSmall")


@should
def small_copied_part_in_the_middle(w):
    upload = w.start("smallcopy")
    etags = [(1, w.copy("smallcopy", upload, 1, 0, 1000)), (2, w.part("smallcopy", upload, 2, b"tail"))]
    return refused(lambda: w.complete("smallcopy", upload, etags), "EntityTooSmall")


@must
def wrong_etag_of_a_part(w):
    upload = w.start("etag")
    w.part("etag", upload, 1, b"x")
    return refused(lambda: w.complete("etag", upload, [(1, '"0123456789abcdef0123456789abcdef"')]), "InvalidPart")


@must
def part_that_is_not_there(w):
    upload = w.start("absent")
    etag = w.part("absent", upload, 1, w.big[: 5 * MIB])
    return refused(lambda: w.complete("absent", upload, [(1, etag), (2, etag)]), "InvalidPart")


@should
def parts_out_of_order(w):
    upload = w.start("back")
    etags = [(2, w.part("back", upload, 2, w.big[: 5 * MIB])), (1, w.part("back", upload, 1, w.big[: 5 * MIB]))]
    return refused(lambda: w.complete("back", upload, etags), "InvalidPartOrder")


@should
def copy_of_a_source_that_changed(w):
    upload = w.start("changed")
    return refused(
        lambda: w.copy("changed", upload, 1, 0, 5 * MIB, CopySourceIfMatch='"0123456789abcdef0123456789abcdef"'),
        "PreconditionFailed",
        "412",
    )


@must
def copy_behind_the_end(w):
    upload = w.start("behind")
    return refused(
        lambda: w.copy("behind", upload, 1, 0, len(w.big) + 1), "InvalidArgument", "InvalidRange", "InvalidRequest"
    )


@should
def complete_only_once(w):
    w.put("there", b"1")
    upload = w.start("there")
    etag = w.part("there", upload, 1, b"2")
    found = refused(lambda: w.complete("there", upload, [(1, etag)], IfNoneMatch="*"), "PreconditionFailed", "412")
    return (found is True and w.get("there") == b"1") or f"{found}, overwritten"


@must
def whole_copy(w):
    w.s3.copy_object(Bucket=w.bucket, Key="copy", CopySource={"Bucket": w.bucket, "Key": "big"})
    return w.get("copy") == w.big


@must
def pages_of_a_list(w):
    for number in range(12):
        w.put(f"pages/{number:02}", b"")
    keys, token = [], {}
    while True:
        page = w.s3.list_objects_v2(Bucket=w.bucket, Prefix="pages/", MaxKeys=5, **token)
        keys += [one["Key"] for one in page["Contents"]]
        if not page["IsTruncated"]:
            return keys == [f"pages/{number:02}" for number in range(12)]
        token = {"ContinuationToken": page["NextContinuationToken"]}


@must
def folders_of_a_list(w):
    for key in ("dir/a/1", "dir/b", "dir/c/2"):
        w.put(key, b"")
    page = w.s3.list_objects_v2(Bucket=w.bucket, Prefix="dir/", Delimiter="/")
    return ([one["Key"] for one in page["Contents"]], [one["Prefix"] for one in page["CommonPrefixes"]]) == (
        ["dir/b"],
        ["dir/a/", "dir/c/"],
    )


@must
def strange_key(w):
    key = "strange/a b+c=d&e'f(ü)%20"
    w.put(key, b"strange")
    w.s3.copy_object(Bucket=w.bucket, Key="strange/copy", CopySource={"Bucket": w.bucket, "Key": key})
    return w.get(key) == w.get("strange/copy") == b"strange" and key in w.keys("strange/")


@must
def removed_at_once(w):
    w.put("removed", b"1")
    w.s3.delete_object(Bucket=w.bucket, Key="removed")
    w.put("removed2", b"1")
    w.s3.delete_objects(Bucket=w.bucket, Delete={"Objects": [{"Key": "removed2"}]})
    return refused(lambda: w.get("removed"), "NoSuchKey") is True and "removed2" not in w.keys()  # noqa: SIM118


def run() -> set[str]:
    """Ask everything; the names of the questions that are answered otherwise."""
    begin = time.time()
    world, wrong = World(), {"must": [], "should": []}
    for group, question in QUESTIONS:
        try:
            answer = question(world)
        except Exception as error:  # noqa: BLE001 - any failure of a server under test is an answer
            answer = f"{type(error).__name__}: {str(error)[:140]}"
        if answer is not True:
            wrong[group].append(question.__name__)
            print(f"  {group:6} {question.__name__}: {answer}")
    count = len(QUESTIONS)
    good = count - len(wrong["must"]) - len(wrong["should"])
    counts = f"must: {len(wrong['must'])} wrong, should: {len(wrong['should'])} wrong"
    print(f"{good} of {count} as S3 does; {counts}; {time.time() - begin:.1f} s")
    return {name for names in wrong.values() for name in names}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fake", action="store_true")
    if parser.parse_args().fake:
        from s3_server import S3Server

        with S3Server() as server:
            os.environ.update(server.env())
            sys.exit(bool(run()))
    sys.exit(bool(run()))
