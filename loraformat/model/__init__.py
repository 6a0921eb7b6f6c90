"""What things are: frozen data about adapters, bundles and checkpoints. No I/O; torch only when values are loaded."""
