"""How each kind of update is made ready for blocks of rows of a stored tensor."""

__all__ = ["arithmetic", "placement", "steps"]
