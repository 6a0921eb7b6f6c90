"""Files and records: weights, other files, manifest, digests, journal."""

__all__ = ["digests", "file_tasks", "manifest", "other_files", "receipts", "run", "shares", "weights"]
