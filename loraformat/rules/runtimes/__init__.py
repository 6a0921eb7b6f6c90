"""Family 6: how programs that load adapters handle this one."""

__all__ = ["exports", "images", "loading", "serving"]
