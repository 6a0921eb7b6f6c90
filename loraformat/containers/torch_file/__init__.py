"""The zip that torch.save writes: read strictly, written from a layout, nothing in it executed."""

__all__ = ["checksum", "layout", "pickle_subset", "state_dict", "zip_directory"]
