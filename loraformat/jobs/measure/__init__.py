"""What the verbs measure: norms, changes of a base, differences of adapters and checkpoints."""

__all__ = ["changes", "diff_adapters", "diff_checkpoints", "figures", "roundtrip", "verify_base"]
