"""Files of this machine: read, written whole or not at all."""
