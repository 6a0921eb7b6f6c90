"""GGUF, the file of llama.cpp: its header, its block types, and files laid out to be written."""

__all__ = ["block_reference", "blocks", "header", "layout", "scheme", "tensors", "types"]
