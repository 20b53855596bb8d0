"""Elastic consistency (2001.05918): elastic scheduling, bounds, error feedback in shared memory."""
