"""Files that are read over a network, whatever the service."""

__all__ = ["filesystems", "whole_files"]
