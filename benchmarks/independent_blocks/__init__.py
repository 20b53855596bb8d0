"""The comparisons of "99% of Distributed Optimization is a Waste of Time" (1901.09437), simulated."""
