"""Family 5: metadata, the model card and the tokenizer."""

__all__ = ["card", "statements", "vocabulary"]
