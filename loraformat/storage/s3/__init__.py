"""Objects under a prefix of a bucket as a folder, over the S3 protocol."""

__all__ = ["address", "staging", "store"]
