"""Local steps: what a round every so many steps does to the loss, and what a step of it takes."""
