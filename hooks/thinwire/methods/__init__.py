"""What to do with gradients or replicas, as frozen values that hold no tensors; one file a method."""

from thinwire.methods.base import Method
from thinwire.methods.block_sparse import BlockSparse, Dense, block_sparse
from thinwire.methods.divide_and_shuffle import DivideAndShuffle
from thinwire.methods.elastic import Elastic
from thinwire.methods.local_steps import LocalSteps

__all__ = ["BlockSparse", "Dense", "DivideAndShuffle", "Elastic", "LocalSteps", "Method", "block_sparse"]
