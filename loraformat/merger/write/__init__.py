"""Files and records: weights, other files, manifest, digests, journal."""
