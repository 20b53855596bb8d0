"""The bounds B of elastic consistency (Nadiradze et al., 2001.05918), as functions.

x is the ideal iterate, to which every gradient has been applied; v what a worker computes its gradient at. Elastic
consistency is E||x - v||^2 <= lr^2 B^2, with one B for all steps and workers, and SGD then converges as it does with
B = 0, to terms of higher order. second_moment is M, with E||g||^2 <= M^2 for every worker's stochastic gradient g;
deviation is sigma, with E||g - E g||^2 <= sigma^2. All results are in the units of a gradient's norm.

The systems and the forms of their bounds are the paper's. The constants were derived again, and each docstring says
what from; those with a 3 need a learning rate of at most 1 / (6 L max_delay), where gradients are L-Lipschitz.
"""

import math


def late_messages(late: int, workers: int, second_moment: float) -> float:
    """Synchronous rounds in which each worker misses up to ``late`` of the others' messages until the next round.

    x - v is lr / workers times the sum of the missing gradients: the triangle inequality.
    """
    return late * second_moment / workers


def late_messages_with_own(late: int, workers: int, deviation: float) -> float:
    """The same, where a worker uses its own gradient in the place of a missing one and corrects it later.

    Each missing g_j leaves g_j - g_i, in the mean square at most sigma + sigma, plus 2 L lr B <= sigma because the two
    were computed at different v.
    """
    return 3 * late * deviation / workers


def asynchronous_messages(workers: int, max_delay: int, second_moment: float) -> float:
    """Messages of the other workers arrive up to ``max_delay`` steps late.

    Of each of the last max_delay steps, up to workers - 1 gradients are missing: the triangle inequality.
    """
    return (workers - 1) * max_delay * second_moment / workers


def shared_memory(elements: int, max_delay: int, second_moment: float) -> float:
    """Workers read and write shared parameters without locks; each element may be up to ``max_delay`` updates old.

    Each element of x - v is a sum of at most max_delay elements of gradients, none larger than its gradient's norm.
    Where x - v lacks only elements of the last max_delay updates, each at most once, as in sequences of atomic
    writes, max_delay * M without the root of the number of elements is a bound as well.
    """
    return math.sqrt(elements) * max_delay * second_moment


def error_feedback(gamma: float, second_moment: float) -> float:
    """What is sent of w is Q(w) with ||Q(w) - w||^2 <= gamma ||w||^2, in expectation for random selections, and the
    rest is kept.

    For a share of the blocks of each parameter, the heaviest or drawn uniformly, gamma is 1 less the smallest share.
    The residual e obeys E||e'||^2 <= gamma E||e + g||^2, which with Young's inequality of parameter 1 - gamma sums
    to this. Infinite where gamma is 1 or more.
    """
    if gamma >= 1:
        return math.inf
    return math.sqrt((2 - gamma) * gamma / (1 - gamma) ** 3) * second_moment


def elastic_norm_bounded(beta: float, tensors: int, max_delay: int, second_moment: float,
                         deviation: float = 0.0) -> float:  # fmt: skip
    """A worker goes on when tensors with a share ``beta`` of a step's norm have arrived, a norm being the sum of all
    ``tensors``' L2 norms; the others come up to ``max_delay`` steps late.

    The paper's bound is O(M), vanishing as beta goes to 1; the constant is our derivation. What is missing of one
    step has at most the norm (1 - beta) times the sum of the P tensors' norms, which is at most sqrt(P) ||g||
    (Cauchy-Schwarz), and never more than ||g||; max_delay steps add up. That holds for norms of the averaged
    gradient. Where a worker weighs by the norms of its own gradient, what is missing of the average may be
    larger by their difference, in the mean square sigma, to first order in lr: give it as deviation.

    Raises ValueError where beta is not in [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"elastic_norm_bounded(beta={beta}): beta must be in [0, 1]")
    if beta == 1:
        return 0.0  # everything has arrived
    share = (1 - beta) * math.sqrt(tensors)
    return max_delay * min(second_moment, share * second_moment + deviation)


def elastic_variance_bounded(deviation: float, max_delay: int = 1) -> float:
    """A worker uses its own gradient in the place of late tensors and corrects it up to ``max_delay`` steps later.

    The paper's bound is O(sigma) for max_delay = 1; the constant is our derivation. What is missing of one step is
    part of mean(g) - g_i, in the mean square at most sigma + sigma, plus 2 L lr B <= sigma because the gradients were
    computed at different v; max_delay steps add up.
    """
    return 3 * max_delay * deviation


def local_steps(every: int, overlap: int, second_moment: float) -> float:
    """Workers step on their own gradients and average their parameters every so many steps, each average being
    ``overlap`` steps under way, in which a worker goes on.

    The paper has no local steps; this is our derivation from its definition, for SGD without momentum that averages
    exactly. The mean of the workers moves by the mean of their gradients, averages change nothing of it, and so it is
    the ideal iterate x. A worker is at most every - 1 + overlap steps of its own away from the parameters that all last
    agreed on: one lands when overlap further steps are made, and is of what was there before them. So x - v is the sum
    of so many mean(g) - g_i, each of which, in the mean square over workers, is at most g_i, and the triangle
    inequality gives this. It bounds the distance from the agreed parameters too, there for each worker by itself.
    """
    return (every - 1 + overlap) * second_moment
