"""Asynchronous SGD in shared memory, on one machine, after Hogwild."""

from thinwire.hogwild.run import Report, WorkerError, Workers, train

__all__ = ["Report", "WorkerError", "Workers", "train"]
