"""Base and adapters to a merged checkpoint: planned from headers, executed in windows."""
