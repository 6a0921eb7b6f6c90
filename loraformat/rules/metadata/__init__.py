"""Family 5: what is said about the adapter, its card and its tokens."""
