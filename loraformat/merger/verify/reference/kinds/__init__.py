"""What each kind of update makes of rows of a stored weight, in float64, from its formula."""

__all__ = ["effect", "effects"]
