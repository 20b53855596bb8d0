"""What train.py runs: tasks, methods, which runs there are, and where their results are kept."""
