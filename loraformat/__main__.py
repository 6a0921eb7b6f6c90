"""python -m loraformat."""

from loraformat.cli import main

main(prog_name="loraformat")
