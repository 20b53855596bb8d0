"""Local steps: an anchor that all ranks agree on, rounds that step it, and what counts the steps of a round."""
