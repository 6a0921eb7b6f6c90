"""What the verbs measure: norms, changes of a base, differences of adapters and checkpoints."""
