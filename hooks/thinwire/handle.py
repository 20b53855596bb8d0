"""What every front door is to its user: a method at work, with its figures and its state."""

from thinwire import agree, checkpoint
from thinwire.methods import Method, block_sparse
from thinwire.reducer import Reducer
from thinwire.stats import Stats
from thinwire.wire import Wire


class Handle:
    """Figures and state of a method at work on one model. ``attach`` and the Horovod compressor give you one."""

    def __init__(self, method: Method, grad_scaler=None):
        self.method = method
        self._block_sparse = block_sparse(method)
        self._grad_scaler = grad_scaler
        self._scale: float | None = None
        self._step = 0
        self._agreed = False
        self._stats = Stats()
        self._reducer: Reducer | None = None
        self._waiting_state = None

    def __repr__(self):
        return f"<{type(self).__name__} of {self.method}, {self._stats.steps} steps>"

    def stats(self) -> dict[str, float]:
        """Totals of this rank: steps, bytes_sent, bytes_received, dense_bytes, compression, encode_s, exchange_s,
        decode_s. See :class:`thinwire.stats.Stats`."""
        return self._stats.as_dict()

    def state_dict(self) -> dict:
        """This rank's state: only tensors, numbers and strings, keyed by parameter name. Save one a rank.

        It loads under ``torch.load(weights_only=True)``. Raises RuntimeError where there is no model yet.
        """
        if self._reducer is None:
            raise RuntimeError("state_dict(): this HookState has no model yet; call it after the first backward pass")
        scale = 0.0 if self._scale is None else self._scale
        return checkpoint.save(self.method, self._reducer) | {"step": self._step, "scale": scale}

    def load_state_dict(self, state) -> None:
        """Continue where a state was saved. Call it on every rank: in the next step they compare where they are.

        state: this rank's shard; or the list of all ranks' shards, which also fits another number of ranks: old
        rank i's residual goes to rank i modulo the new number, scaled so that the mean over ranks, which is what
        training will see of it, is unchanged; a control variate restarts on every rank from the common mean.
        Buckets may differ. Raises ValueError, with nothing changed, where the state does not fit.
        """
        if self._reducer is None:
            checkpoint.check(state, self.method)
            self._waiting_state = state
        else:
            shard = checkpoint.load(state, self.method, self._reducer, self._numels)
            self._step, self._scale, self._agreed = shard["step"], shard["scale"] or None, False

    def _start(self, numels: dict[str, int], rank: int, world_size: int, wire: Wire | None = None) -> None:
        """Make the reducer, for a model whose parameters have these sizes."""
        self._numels = numels
        self._reducer = Reducer(self._block_sparse, rank, world_size, wire)
        if self._waiting_state is not None:
            state, self._waiting_state = self._waiting_state, None
            self.load_state_dict(state)

    def _agree(self, all_gather_object) -> None:
        """Compare with the other ranks, once; see thinwire.agree."""
        if not self._agreed:
            agree.require(all_gather_object(agree.describe(self.method, self._step, self._numels)))
            self._agreed = True

    def _follow_scale(self) -> None:
        """Gradients arrive multiplied by the GradScaler's scale; what memory holds must be too."""
        if self._grad_scaler is None or not self._grad_scaler.is_enabled():
            return
        scale = self._grad_scaler.get_scale()
        if self._scale not in (None, scale):
            self._reducer.memory.rescale(scale / self._scale)
        self._scale = scale
