"""Elastic scheduling: a step that does not wait for all of its averages."""

from dataclasses import dataclass, fields

from thinwire.methods.base import Method, check_integer, check_number, check_one_of, given
from thinwire.methods.block_sparse import BlockSparse, Dense, block_sparse

DECISIONS = ("agreed", "arrival")


@dataclass(frozen=True)
class Elastic(Method):
    """Do not wait for all of a step's averages; apply the rest a little later (Nadiradze et al., 2001.05918).

    A bucket that is not waited for is late: it travels behind the next steps' computation, and its average is added
    to the gradient of a later step. No gradient is lost or applied twice. Buckets are DDP's: with few of them (see
    its ``bucket_cap_mb``) there is little to choose from. Use it with ``thinwire.attach(ddp, method,
    optimizer=optimizer)`` or ``thinwire.horovod.Compressor(named_parameters, method, optimizer=optimizer)``, and call
    ``finalize()`` at the end, and evaluate in ``evaluating()``; both on every rank.

    method: how a bucket is averaged: ``Dense()`` or a ``BlockSparse``.
    beta: the share of the gradient's norm, a sum over its parameters' L2 norms, that must have been averaged before a
        step is made, in [0, 1]. At 1 nothing is late, which is ``method`` itself, bit for bit; at 0 everything is.
        Lower hides more of the network and delays more of the gradient: begin at 0.8.
    max_delay: by how many steps a late average may be late, at least 1.
    speculate: use the rank's own gradient in the place of a late average, and correct it when that is there (the
        paper's variance-bounded scheduler), instead of nothing (norm-bounded). Replicas then differ by what is not
        yet corrected. It helps where the ranks' gradients are alike: where their deviation is below their mean.
    decide: which buckets are late.
        ``agreed``   decided before a step from the norms of the step before, added up over the ranks: the fewest
                     buckets, the heaviest first, that make up beta of the norm are waited for, and the others are
                     applied exactly max_delay steps later. The same on every rank, so replicas stay bitwise equal
                     (but for speculate) and every optimizer works. Of a gradient whose norm is more than ten times
                     that of the step before nothing is late, so that loops can judge it in its own step
        ``arrival``  the paper's rule: wait until the buckets that have arrived, whichever they are, carry beta of
                     the rank's norm. Replicas differ by what is late until ``finalize()``

    The learning rate that counts for a late average is that of the step that issued it, as its backward pass found
    it, for ``torch.optim.SGD`` without momentum: the average is multiplied by the ratio of the two. Other optimizers'
    steps are not proportional to the gradient, and in a momentum buffer the ratio would outlive the rate it was meant
    for, so there it is the rate of the step that applies it.

    Where replicas may differ, with speculate or arrival, the optimizer must be a ``torch.optim.SGD`` without momentum
    and weight decay: only then is the result the same, to rounding, in whichever step a gradient is applied.
    ``BlockSparse(momentum=...)`` keeps momentum before anything is sent, and is allowed.

    Raises TypeError or ValueError for a wrong value or a combination that cannot be right.
    """

    method: Method
    beta: float = 0.8
    max_delay: int = 1
    speculate: bool = False
    decide: str = "agreed"

    def __post_init__(self):
        if not isinstance(self.method, (Dense, BlockSparse)):
            raise TypeError(f"{given(self, 'method')}: method must be a Dense or a BlockSparse")
        block_sparse(self.method)
        check_number(self, "beta", "a number in [0, 1]", lambda x: 0 <= x <= 1)
        object.__setattr__(self, "beta", float(self.beta))
        check_integer(self, "max_delay", 1)
        check_one_of(self, "speculate", (True, False))
        check_one_of(self, "decide", DECISIONS)

    @property
    def replicas_differ(self) -> bool:
        """Whether ranks may apply the same average in different steps."""
        return self.beta < 1 and (self.speculate or self.decide == "arrival")

    @staticmethod
    def differed(described: dict[str, str]) -> bool:
        """``replicas_differ`` of the method that was described so."""
        return described.get("elastic.speculate") == "True" or described.get("elastic.decide") == "arrival"

    def describe(self) -> dict[str, str]:
        """As any method's; the fields of the method inside are among them, under their own names."""
        mine = {f"elastic.{f.name}": str(getattr(self, f.name)) for f in fields(self) if f.name != "method"}
        return self.method.describe() | mine

    def as_block_sparse(self) -> BlockSparse:
        raise TypeError(
            f"method is {self!r}: it needs the optimizer; use thinwire.attach(ddp, method, optimizer=optimizer)"
        )
