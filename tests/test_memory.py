"""What is not sent is kept, exactly; and the control variate finds the optimum where no memory stalls."""

import gc

import pytest
import torch
import torch.distributed as dist
from models import ALL_METHODS, attach, data, flat, label, local_gradient, mlp, sgd, step, wrap
from simulated import Simulated
from thinwire import BlockSparse

WITH_FEEDBACK = [m for m in ALL_METHODS if m.memory == "error_feedback"]


def mass(handle, model, key="residual"):
    state = handle.state_dict()["memory"][key]
    names = [name for name, _ in model.named_parameters()]
    return torch.cat([state[name].to(torch.float64) for name in names]) if state else 0.0


def conserve(rank, n, method, steps=12):
    """Per step: sum over ranks of (gradient + old residual) against n * result + sum of new residuals."""
    model = mlp()
    ddp = wrap(model)
    optimizer = sgd(ddp)
    handle = attach(ddp, method, optimizer)
    batches, errors = data(rank), []
    for _ in range(steps):
        x, y = next(batches)
        before = mass(handle, model) + torch.zeros(1, dtype=torch.float64)
        brought = before + flat(local_gradient(model, (x, y)))
        if method.momentum:
            brought = brought + method.momentum * mass(handle, model, "velocity")
        model.zero_grad()
        ((ddp(x) - y) ** 2).mean().backward()
        kept = mass(handle, model)
        both = torch.stack([brought, kept])
        dist.all_reduce(both)
        result = n * flat(p.grad for p in model.parameters())
        errors.append(((both[1] + result - both[0]).abs().max() / both[0].abs().max()).item())
        optimizer.step()
    return errors


@pytest.mark.parametrize("method", WITH_FEEDBACK, ids=label)
def test_error_feedback_conserves(ranks, method):
    """To rounding of the float32 sums: nothing is lost at any wire dtype, nothing is sent twice."""
    for errors in ranks(3).run(conserve, method):
        assert max(errors) < 1e-6


def exact_values(rank, n, method):
    """With integers as gradients every sum is exact, so conservation must be too."""
    model = torch.nn.Linear(64, 64, bias=False)
    ddp = wrap(model)
    optimizer = sgd(ddp)
    handle = attach(ddp, method, optimizer)
    generator = torch.Generator().manual_seed(rank)
    kept = torch.zeros(64 * 64)
    for _ in range(6):
        gradient = torch.randint(-99, 100, (64, 64), generator=generator).float()
        model.zero_grad()
        (ddp(torch.eye(64)).t() * gradient).sum().backward()
        brought = kept + gradient.flatten()
        kept = handle.state_dict()["memory"]["residual"]["weight"]
        both = torch.stack([brought, kept])
        dist.all_reduce(both)
        if not torch.equal(both[1] + n * model.weight.grad.flatten(), both[0]):
            return False
        optimizer.step()
    return True


@pytest.mark.parametrize("wire_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("selection", ["independent", "permuted", "shared", "topk", "nominated"])
def test_error_feedback_conserves_exactly(ranks, selection, wire_dtype):
    method = BlockSparse(selection, density=0.1, memory="error_feedback", wire_dtype=wire_dtype)
    assert all(ranks(2).run(exact_values, method))


def momentum_by_method(rank, n, method):
    finals = []
    for mine in (method, None):
        model = mlp()
        ddp = wrap(model)
        optimizer = sgd(ddp, momentum=0.0 if mine else 0.9)
        if mine:
            attach(ddp, mine, optimizer)
        batches = data(rank)
        for _ in range(20):
            step(ddp, optimizer, next(batches))
        finals.append(flat(model.parameters()))
    return finals


def test_momentum_correction_of_whole_gradients_is_momentum_sgd(ranks):
    method = BlockSparse("topk", density=1.0, momentum=0.9)
    ours, plain = ranks(2).run(momentum_by_method, method)[0]
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def masked(rank, n):
    model = mlp(layers=2)
    ddp = wrap(model)
    handle = attach(ddp, BlockSparse("topk", density=0.1, block_size=16, momentum=0.9), sgd(ddp))
    x, y = next(data(rank))
    ((ddp(x) - y) ** 2).mean().backward()
    state = handle.state_dict()["memory"]
    return all(torch.equal(state["residual"][k] == 0, state["velocity"][k] == 0) for k in ("0.weight", "2.weight"))


def test_momentum_is_cleared_where_a_block_was_sent(ranks):
    assert all(ranks(2).run(masked))


class Quadratic(torch.nn.Module):
    """x with f_i(x) = |A_i x - b_i|^2 / 2 in float64: the ranks' optima differ, their mean's is computable."""

    def __init__(self, rank, n, d=64):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(d, dtype=torch.float64))
        generator = torch.Generator().manual_seed(7)
        scale = 0.5 + torch.rand(n, d, generator=generator, dtype=torch.float64)
        centre = torch.randn(n, d, generator=generator, dtype=torch.float64)
        self.optimum = (scale * centre).sum(0) / scale.sum(0)
        self.scale, self.centre = scale[rank], centre[rank]

    def forward(self):
        return 0.5 * (self.scale * (self.x - self.centre) ** 2).sum()


def descend(rank, n, method, steps):
    """x after some steps on a real group."""
    model = Quadratic(rank, n)
    ddp = wrap(model)
    attach(ddp, method)
    optimizer = sgd(ddp, lr=0.15)
    for _ in range(steps):
        optimizer.zero_grad()
        ddp().backward()
        optimizer.step()
    return model.x.detach()


def descend_simulated(n, method, steps):
    """The same on a simulated one, and how far x is from the optimum."""
    models, ranks = [Quadratic(rank, n) for rank in range(n)], Simulated(method, n, name="x")
    x = torch.zeros_like(models[0].optimum)
    for number in range(steps):
        mean, _ = ranks.step([model.scale * (x - model.centre) for model in models], number)
        x.add_(mean, alpha=-0.15)
    return x, (x - models[0].optimum).norm().item()


def on_quadratic(selection, memory, wire_dtype):
    return BlockSparse(selection, memory=memory, block_size=4, dense_below=0, wire_dtype=wire_dtype)


WIRES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("selection", ["independent", "permuted", "shared"])
@pytest.mark.parametrize("wire_dtype", WIRES)
def test_control_variate_reaches_the_optimum_where_no_memory_stalls(one_thread, selection, wire_dtype):
    assert descend_simulated(4, on_quadratic(selection, "control_variate", wire_dtype), 900)[1] < 1e-10
    if selection != "shared":  # a shared mask's variance is of the mean gradient, which vanishes at the optimum
        assert descend_simulated(4, on_quadratic(selection, "none", wire_dtype), 200)[1] > 1


@pytest.mark.parametrize(
    ("selection", "wire_dtype"),
    [("independent", torch.float32), ("shared", torch.float16), ("shared", torch.bfloat16)]
    + [pytest.param("permuted", wire_dtype, marks=pytest.mark.full) for wire_dtype in WIRES],
)
def test_a_simulated_group_has_the_bits_of_a_real_one(ranks, selection, wire_dtype):
    method = on_quadratic(selection, "control_variate", wire_dtype)
    x, _ = descend_simulated(4, method, 40)
    assert all(torch.equal(mine, x) for mine in ranks(4).run(descend, method, 40))


def buffers(rank, n, optimizer_known):
    """Bytes of all tensors that the handle keeps, against the gradient's."""
    model = mlp(width=64)
    ddp = wrap(model)
    optimizer = sgd(ddp)
    handle = attach(ddp, BlockSparse("topk", density=0.05), optimizer if optimizer_known else None)
    batches = data(rank, width=64)
    for _ in range(3):
        step(ddp, optimizer, next(batches))
    gc.collect()
    stores = list(handle._reducer.memory.stores().values())
    states = [one for store in stores for one in store._flats.values()]
    kept = [flat for one in states for flat in (one.now, one.before) if flat is not None]
    own = {flat.untyped_storage().data_ptr() for flat in kept}
    views = {view.untyped_storage().data_ptr() for store in stores for view in store.views().values()}
    nbytes = sum(flat.numel() * flat.element_size() for flat in kept)
    return nbytes / sum(p.numel() * p.element_size() for p in model.parameters()), views <= own


@pytest.mark.parametrize(("optimizer_known", "times"), [(False, 1), (True, 2)])
def test_error_feedback_keeps_one_buffer_of_the_gradients_size_and_one_to_go_back_to(ranks, optimizer_known, times):
    for kept, no_others in ranks(2).run(buffers, optimizer_known):
        assert kept == times and no_others


def too_large(rank, n, method, dtype, sizes):
    """Finite gradients that overflow somewhere on the way: the residual before and after, and later results."""
    model = torch.nn.Linear(64, 64, bias=False, dtype=dtype)
    ddp = wrap(model)
    optimizer = sgd(ddp)
    handle = attach(ddp, method, optimizer)
    generator = torch.Generator().manual_seed(rank)
    finite, residuals = [], []
    for size in [1.0] * 3 + sizes + [1.0] * 3:
        gradient = torch.randn(64, 64, generator=generator).clamp(-1, 1).to(dtype) * size
        model.zero_grad()
        (ddp(torch.eye(64, dtype=dtype)).t() * gradient).sum().backward()
        finite.append(bool(torch.isfinite(model.weight.grad).all()))
        residuals.append(handle.state_dict()["memory"]["residual"]["weight"])
        if finite[-1]:
            optimizer.step()
    kept = all(bool(torch.isfinite(r).all()) for r in residuals)
    return finite, kept


@pytest.mark.parametrize("selection", ["topk", "nominated"])
@pytest.mark.parametrize(("wire_dtype", "dtype", "sizes"), [
    (torch.float16, torch.float32, [1e20]), (torch.bfloat16, torch.float32, [3.3e38]),
    (torch.float32, torch.float64, [1e39]), (torch.float32, torch.float32, [2e38, 2e38]),
    (torch.float16, torch.float32, [4e18, 4e18, 4e18]),
], ids=str)  # fmt: skip
def test_gradients_too_large_for_the_wire_do_not_poison_the_residual(ranks, selection, wire_dtype, dtype, sizes):
    method = BlockSparse(selection, density=0.1, wire_dtype=wire_dtype)
    for finite, kept in ranks(2).run(too_large, method, dtype, sizes):
        assert kept
        assert finite[:3] == [True] * 3 and finite[-3:] == [True] * 3
        assert not all(finite)
