"""The server of these tests answers as S3 does, as far as a merge depends on it."""

from __future__ import annotations

import s3_contract
from s3_server import S3Server


def test_the_server_answers_all_questions_as_s3_does(empty: S3Server) -> None:
    assert s3_contract.run() == set()
