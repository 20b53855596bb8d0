"""Where backward passes begin and end, seen from parameters' gradients: there is no wrapper here that would tell."""

import contextlib
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch


class Passes:
    """Tells of backward passes that add to the gradients of some parameters, until ``close``.

    handle: whom, held weakly: ``begin_pass`` before the first gradient, ``take_in`` with one parameter and its gradient
    at a time, ``end_pass`` after the last. What they raise comes out of the backward pass. With reentrant checkpointing
    each segment is a pass of its own. parameters: those that are frozen now count when they are trained.
    """

    def __init__(self, handle: Any, parameters: Iterable[torch.Tensor]):
        self._handle = weakref.ref(handle)
        with _trainable(parameters) as all_of_them:
            self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in all_of_them]
            # What adds to a gradient in autograd's graph, with others' hooks on it: nobody else holds it meanwhile.
            self._nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in all_of_them]
        self._under_way: set[int] = set()  # in autograd's numbers; those that broke off stay, and do no harm
        self._lock = threading.Lock()  # autograd has a thread for each device

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._nodes.clear()

    def _arrived(self, parameter):
        handle = self._handle()
        if handle is None:
            raise RuntimeError(
                "this model's LocalSteps is gone, because nothing holds its handle or its optimizer any more, so "
                "nothing would average its replicas: keep the optimizer that was given to thinwire.horovod.LocalSteps, "
                "or make it again with the new one, and call the handle's close() to train on without it"
            )
        number = torch._C._current_graph_task_id()
        with self._lock:
            if number not in self._under_way:
                handle.begin_pass()
                self._under_way.add(number)
                torch.autograd.Variable._execution_engine.queue_callback(lambda: self._over(number))
        handle.take_in([parameter], parameter.grad)

    def _over(self, number):
        self._under_way.discard(number)
        if (handle := self._handle()) is not None:
            handle.end_pass()


@contextlib.contextmanager
def _trainable(parameters):
    """Those that can be trained, as a list, trainable meanwhile: autograd takes no hook of a frozen one."""
    some = [p for p in parameters if p.is_floating_point()]
    frozen = [p for p in some if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield some
    finally:
        for p in frozen:
            p.requires_grad_(False)
