"""LoRA adapters on disk: inspect, validate, convert and merge them without loading a model."""

__version__ = "0.1.0"
