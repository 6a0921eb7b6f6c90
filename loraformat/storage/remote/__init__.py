"""Files that are read over a network, from any service."""

__all__ = ["filesystems", "whole_files"]
