"""adapter_config.json: its fields, its patterns, and which version of PEFT wrote it."""

__all__ = ["fields", "settings", "versions"]
