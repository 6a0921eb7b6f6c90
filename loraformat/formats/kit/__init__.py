"""What the formats share: fields of configs, factors, scaling, findings and losses. No format itself."""

__all__ = [
    "base",
    "blocks",
    "factors",
    "fields",
    "findings",
    "folder",
    "image",
    "losses",
    "normalize",
    "pairs",
    "read_only",
    "repairs",
    "scaling",
    "targets",
    "update_slots",
]
