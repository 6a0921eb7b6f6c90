"""Model cards: what an output is made of and how it is loaded, as the README.md of its repository."""

__all__ = ["escaping", "facts", "publish", "verb"]
