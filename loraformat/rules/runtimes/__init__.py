"""Family 6: what programs that load adapters do with this one."""

__all__ = ["exports", "images", "loading", "serving"]
