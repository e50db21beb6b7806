"""A model in stages: ranges of layers, each in a process of its own."""
