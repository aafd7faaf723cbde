"""What the commands of `pgen` do; `pgen.cli` declares them, and imports this only when one is called."""
