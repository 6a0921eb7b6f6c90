"""The zip that torch.save writes: read strictly, written from a layout, nothing in it executed."""

__all__ = ["archive", "checksum", "layout", "zip_directory"]
