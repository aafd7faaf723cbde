"""Adaptation: what a kernel must be told about its target, learned from many chains at once."""
