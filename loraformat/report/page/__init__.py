"""Reports as one page or one figure."""

__all__ = ["figure", "heatmap", "html", "svg"]
