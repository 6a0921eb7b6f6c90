"""Reports for CI services, editors and hooks."""

__all__ = ["concise", "github", "gitlab", "junit", "sarif"]
