"""Many requests answered with one model, in steps that they share."""
