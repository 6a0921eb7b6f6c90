"""Family 5: what is said about the adapter, its card and its tokens."""

__all__ = ["card", "statements", "vocabulary"]
