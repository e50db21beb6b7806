"""A model in stages: ranges of its layers in processes of their own, on one machine or several."""
