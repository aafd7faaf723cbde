"""Pure algorithms on tensors and callables: nothing here knows of programs, sites or plugins."""
