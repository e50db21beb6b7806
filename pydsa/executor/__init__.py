"""The graph executor: record a model, lay it out, place it on devices, run it."""
