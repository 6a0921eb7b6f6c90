"""Checkpoints of torch.distributed: `.metadata` and `.distcp` files, read strictly; nothing in them is executed."""

__all__ = ["metadata", "metadata_pickle", "tensors"]
