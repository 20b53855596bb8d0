"""A state that no run has saved is refused whole; one that a run has saved fits, whatever the memory format."""

import copy
import math

import pytest
import thinwire
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models import data, flat, label, logged, mlp, sgd, step, wrap
from simulated_horovod import World, hvd
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic

TOPK = BlockSparse("topk", density=0.1, block_size=16)
NOMINATED = BlockSparse("nominated", density=0.1, block_size=16, dense_below=20)
VARIATE = BlockSparse("shared", density=0.3, block_size=16, memory="control_variate")
METHODS = [
    BlockSparse(),
    TOPK,
    BlockSparse("nominated", density=0.1, block_size=16, momentum=0.5),
    VARIATE,
    BlockSparse("topk", density="auto", max_inconsistency=1.0, min_density=0.01),
    Elastic(NOMINATED, beta=0.3),
    Elastic(Dense(), beta=0.3, decide="arrival"),
    DivideAndShuffle(),
    DivideAndShuffle(overlap="delayed"),
]


def name_of(method):
    return label(method) + str(method.density) if isinstance(method, BlockSparse) else repr(method)[:40]


def trained(method, rank, steps=4, optimizer=torch.optim.SGD, **options):
    """A handle after some steps of a model with several buckets and a buffer of floats."""
    model = torch.nn.Sequential(mlp(layers=2), torch.nn.BatchNorm1d(40), mlp(layers=1))
    ddp = wrap(model)
    optimizer = optimizer(model.parameters(), lr=0.01)
    handle = thinwire.attach(ddp, method, optimizer=optimizer, consistency_every=2, **options)
    for _, batch in zip(range(steps), data(rank)):
        step(ddp, optimizer, batch)
    return model, ddp, optimizer, handle


# ---- wrong values, anywhere ----


def spoilt(x):
    """The tensor with NaN in its last element."""
    x = x.clone()
    x.view(-1)[-1] = math.nan
    return x


ANYTHING = [None, "3", "", b"3", math.nan, math.inf, -1, 0, 1, 2, 1.5, 1e-300, True, 10**30, (), [], [None], {}, [{}],
            {"a": 1}, {3: 3}, 3j, object, torch.zeros(3), torch.tensor(1.0), torch.zeros(2, 2)]  # fmt: skip
TO_TENSORS = [
    spoilt,
    lambda x: torch.full_like(x, -math.inf),
    lambda x: x[:-1],
    lambda x: torch.cat([x, x]),
    lambda x: x[None],
    lambda x: x.reshape(-1, 1),
    lambda x: x.to("meta"),
    lambda x: x.to(torch.complex64),
    lambda x: x.to(torch.int64),
    lambda x: x.bool(),
    lambda x: x.to_sparse(),
    lambda x: x.tolist(),
    lambda x: x.double(),
    lambda x: x * 2,
    lambda x: torch.nn.Parameter(x),
]


def places(thing, path=()):
    """The path of everything in a state."""
    if path:
        yield path
    inner = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


@st.composite
def edited(draw, state):
    """The path of what was changed, and a copy of the state with that replaced, removed or under another name."""
    found = copy.deepcopy(state)
    path = draw(st.sampled_from(list(places(found))))
    holder = found
    for key in path[:-1]:
        holder = holder[key]
    here = holder[path[-1]]
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add"]))
    if kind == "replace":
        if isinstance(here, torch.Tensor) and draw(st.booleans()):
            holder[path[-1]] = draw(st.sampled_from(TO_TENSORS))(here)
        else:
            holder[path[-1]] = draw(st.sampled_from(ANYTHING))
    elif kind == "remove":
        del holder[path[-1]]
    elif isinstance(holder, list):
        holder.append(draw(st.sampled_from(ANYTHING)))
    else:
        name = draw(st.sampled_from([f"module.{path[-1]}", "", 3, None, "pending", "late"]))
        holder[name] = here
        if kind == "rename" and name != path[-1]:
            del holder[path[-1]]
    return path, found


def same(a, b):
    """Whether two states are the same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def alike(found, given_, factor):
    """Whether parts of states are the same numbers: tensors to rounding, those given times a factor."""
    if isinstance(found, torch.Tensor):
        return found.shape == given_.shape and torch.allclose(found.double(), given_.double() * factor, 1e-6, 1e-30)
    if isinstance(found, dict):
        return found.keys() == given_.keys() and all(
            alike(one, given_[key], 1.0 if key == "lr" else factor) for key, one in found.items()
        )
    if isinstance(found, list):
        return len(found) == len(given_) and all(alike(*pair, factor) for pair in zip(found, given_))
    return found == type(found)(given_)


def taken(found, given_, scaler):
    """Whether a handle's state is the one that it was given, as far as that is its own to keep."""
    if given_["world_size"] != found["world_size"]:
        return  # what was kept is dealt to the ranks there are: test_checkpoint.py
    scale = given_.get("scale") or 1.0
    factor = 1.0 if scaler else 1 / scale  # without a GradScaler what was saved under one is scaled back
    known = {"late": [{key: one[key] for key in ("step", "lr", "tensors")} for one in given_.get("late", ())]}
    given_ = given_ | (known if "late" in given_ else {})  # what is unknown is ignored
    for key, default in (("memory", None), ("late", []), ("pending", None)):
        assert key not in found or alike(found[key], given_.get(key, default), factor), key
    for key, default in (("step", None), ("round", None), ("gradient_norm", 0.0), ("late_next", [])):
        assert key not in found or found[key] == type(found[key])(given_.get(key, default)), key
    if given_.get("controller"):
        assert found["controller"].items() <= given_["controller"].items()


FUZZ = settings(max_examples=60, phases=[Phase.generate], deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))  # fmt: skip


def taken_or_refused(handle, good, answers, scaler=None, waiting=None):
    """Load edited states. Each is refused with nothing changed, or is what the handle holds then."""

    @FUZZ
    @given(edited(good))
    def one(change):
        path, bad = change
        before = handle.state_dict()
        try:
            handle.load_state_dict(bad)
        except ValueError as error:
            assert str(error).startswith("load_state_dict"), error
            assert same(handle.state_dict(), before), path
            answers.append(False)
        else:
            taken(handle.state_dict(), bad, scaler)
            handle.load_state_dict(good)
            answers.append(True)
        if waiting is not None and path[0] not in ("rank", "world_size"):
            other = waiting()
            try:
                other.load_state_dict(bad)
            except ValueError:
                assert not answers[-1] and other._waiting_state is None
            else:
                assert answers[-1], path

    handle.load_state_dict(good)
    one()


def fuzzed(rank, n, method):
    optimizer = torch.optim.AdamW if method == DivideAndShuffle(overlap="delayed") else torch.optim.SGD
    model, _, _, handle = trained(method, rank, optimizer=optimizer)
    with logged():
        waits = isinstance(method, BlockSparse)
        waiting = (lambda: thinwire.HookState(method, model)) if waits else None
        answers = []
        taken_or_refused(handle, handle.state_dict(), answers, waiting=waiting)
    return answers.count(True), answers.count(False)


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_an_edited_state_is_taken_as_it_is_or_refused_with_nothing_changed(ranks, method):
    for accepted, refused in ranks(2).run(fuzzed, method):
        assert accepted and refused > 30


def fuzzed_under_a_scaler(rank, n):
    """With its scale in the state."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    *_, handle = trained(TOPK, rank, grad_scaler=scaler)
    good, answers = handle.state_dict(), []
    assert good["scale"] == 4.0
    with logged():
        taken_or_refused(handle, good, answers, scaler)
    return len(answers)


def test_an_edited_state_under_a_grad_scaler(ranks):
    assert all(count > 30 for count in ranks(2).run(fuzzed_under_a_scaler))


def shards_of(rank, n, method):
    everyone = [None] * n
    dist.all_gather_object(everyone, trained(method, rank)[-1].state_dict())
    return everyone


def fuzzed_in_a_list(rank, n, method, shards):
    *_, handle = trained(method, rank)
    handle.load_state_dict(handle.state_dict())
    own, answers = handle.state_dict(), []

    @FUZZ
    @given(st.sampled_from(range(len(shards))).flatmap(lambda i: edited(shards[i]).map(lambda change: (i, change[1]))))
    def one(change):
        i, shard = change
        try:
            handle.load_state_dict([*shards[:i], shard, *shards[i + 1 :]])
        except ValueError as error:
            assert "load_state_dict" in str(error)
            assert same(handle.state_dict(), own)
            answers.append(False)
        else:
            found = handle.state_dict().get("memory", {})
            assert all(bool(t.isfinite().all()) for tensors in found.values() for t in tensors.values())
            handle.load_state_dict(own)
            answers.append(True)

    with logged():
        one()
    return answers.count(True), answers.count(False)


@pytest.mark.parametrize("method", [METHODS[2], VARIATE, DivideAndShuffle()], ids=name_of)
def test_an_edited_shard_in_a_list(ranks, method):
    shards = ranks(3).run(shards_of, method)[0]
    for accepted, refused in ranks(2).run(fuzzed_in_a_list, method, shards):
        assert accepted and refused > 30


@pytest.mark.skipif(hvd is None, reason="Horovod is not installed: 'make horovod' builds it")
def test_an_edited_state_of_horovods_elastic(one_thread):
    """``late_next`` too."""

    def fuzz():
        model = mlp(layers=3)
        inner = sgd(model)
        method = Elastic(BlockSparse("shared", density=0.3, memory="error_feedback", block_size=16), beta=0.3)
        handle = thinwire.horovod.Compressor(model.named_parameters(), method, optimizer=inner)
        optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), compression=handle)
        for _, (x, y) in zip(range(3), data(hvd.rank())):
            optimizer.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
            optimizer.step()
        good, answers = handle.state_dict(), []
        assert good["late"] and good["late_next"]
        with logged():
            taken_or_refused(handle, good, answers)
        assert answers.count(True) and answers.count(False) > 30

    errors = World(2).run(fuzz)
    assert not any(errors), "\n".join(errors)


# ---- what an error says ----


def refusals(rank, n):
    """What is said of some edits, by their names."""
    states = {}
    for key, method in (("topk", TOPK), ("elastic", Elastic(NOMINATED, beta=0.3)), ("shuffle", DivideAndShuffle())):
        *_, handle = trained(method, rank)
        states[key] = handle, handle.state_dict()
    weight = "0.0.weight"

    def of(key, change):
        handle, good = states[key]
        bad = copy.deepcopy(good)
        found = change(bad)
        try:
            handle.load_state_dict(found if isinstance(found, (dict, str)) else bad)
        except ValueError as error:
            return str(error)

    residual = lambda bad: bad["memory"]["residual"]
    return [
        of("topk", lambda bad: bad.update(step="3")),
        of("topk", lambda bad: residual(bad)[weight][3:5].fill_(math.nan)),
        of("topk", lambda bad: residual(bad).update({f"module.{weight}": residual(bad).pop(weight)})),
        of("topk", lambda bad: residual(bad).update({weight: residual(bad)[weight].int()})),
        of("topk", lambda bad: bad["memory"].clear()),
        of("topk", lambda bad: bad.pop("scale")),
        of("topk", lambda bad: "state.pt"),
        of("elastic", lambda bad: list(bad["late"][0].pop("lr"))),
        of("elastic", lambda bad: bad["late"][0]["lr"].update(dict.fromkeys(bad["late"][0]["lr"], -1.0))),
        of("shuffle", lambda bad: bad.update(round=-1)),
        of("shuffle", lambda bad: states["topk"][1] | {"round": 1, "pending": {}}),
        of("shuffle", lambda bad: bad.update(rank=2)),
    ]


def test_an_error_names_the_entry_what_was_found_and_what_is_allowed(ranks):
    says = [
        ("'step' of the state is '3' (str)", "an integer of at least 0"),
        ("residual of '0.0.weight' has 2 elements that are not finite",),
        ("'module.0.0.weight'", "no such parameter", "its name here is '0.0.weight'"),
        ("residual of '0.0.weight' is a tensor", "torch.int32", "floating-point"),
        ("'memory' of the state is a dictionary of nothing", "'residual'"),
        ("not a thinwire state of format 1", "lacks 'scale'"),
        ("'state.pt' (str)", "not a thinwire state"),
        ("'late'[0] of the state lacks 'lr'",),
        ("'lr' of 'late'[0]", "-1.0 (float)", "a finite number of at least 0"),
        ("'round' of the state is -1 (int)", "an integer of at least 0"),
        ("method=BlockSparse", "method=DivideAndShuffle"),
        ("'rank' of the state is 2 (int)", "below its world_size, 2"),
    ]
    for said in ranks(2).run(refusals):
        for message, expected in zip(said, says, strict=True):
            assert all(part in message for part in expected), (message, expected)


def waits_in_vain(rank, n, shards):
    """A state that waits for the model and then is of another number of ranks: every first backward pass says so."""
    model, said = mlp(layers=3), []
    state, optimizer = thinwire.HookState(TOPK, model), sgd(model)
    state.load_state_dict(shards[rank])
    for _ in range(2):
        ddp = wrap(model)
        ddp.register_comm_hook(state, thinwire.hook)
        try:
            step(ddp, optimizer, next(data(rank)))
        except ValueError as error:
            said.append(str(error))
    ddp = wrap(model)
    ddp.register_comm_hook(state, thinwire.hook)
    with logged():
        state.load_state_dict(shards)
        step(ddp, optimizer, next(data(rank)))
    return said, state.state_dict()["step"]


def some_shards(rank, n):
    model = mlp(layers=3)
    ddp = wrap(model)
    handle = thinwire.attach(ddp, TOPK)
    step(ddp, sgd(model), next(data(rank)))
    return handle.state_dict()


def test_a_waiting_state_that_turns_out_not_to_fit_is_not_forgotten(ranks):
    shards = ranks(3).run(some_shards)
    for said, steps in ranks(2).run(waits_in_vain, shards):
        assert len(said) == 2 and all("of 3 on rank" in one for one in said) and steps == 2


# ---- Divide-and-Shuffle on other ranks, with other settings ----


def continued(rank, n, states, method):
    *_, handle = trained(method, rank, steps=1)
    with logged() as said:
        handle.load_state_dict(states)
    for _ in range(2):
        handle.skip_step()
    return handle.state_dict()["round"], said


def test_rounds_go_on_at_another_number_of_ranks_and_with_other_settings(ranks):
    shards = ranks(3).run(shards_of, DivideAndShuffle(overlap="bucket"))[0]
    for states in (shards, shards[0]):
        for round_, said in ranks(2).run(continued, states, DivideAndShuffle(seed=1)):
            assert round_ == 6
            assert any("seed was 0 and is 1" in one and "world_size was 3 and is 2" in one for one in said)


# ---- memory formats ----


class Known(torch.nn.Module):
    """Convolutions whose gradients are given: the loss is linear in the weights."""

    def __init__(self, memory_format):
        super().__init__()
        torch.manual_seed(0)
        sizes = ((8, 8, 3), (8, 16, 1), (16, 8, 3))
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(*size) for size in sizes)
        self.to(memory_format=memory_format)

    def forward(self, gradient):
        return sum((p * one).sum() for p, one in zip(self.parameters(), gradient))


def known(memory_format, method, weights=None):
    model = Known(memory_format)
    if weights is not None:
        model.load_state_dict(weights)
    ddp = wrap(model, bucket_cap_mb=0.003)
    optimizer = sgd(model, lr=0.1)
    return model, ddp, optimizer, thinwire.attach(ddp, method, optimizer=optimizer)


def gradients(model, generator):
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def mean(tensor):
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def on_the_way(handle, model):
    """What waits in a residual, and what is late, in the order of flat(parameters)."""
    state, total = handle.state_dict(), torch.zeros_like(flat(model.parameters()))
    waits = mean(flat(state["memory"].get("residual", {}).get(name, torch.zeros(p.numel()))
                      for name, p in model.named_parameters()))  # fmt: skip
    for late in state.get("late", ()):
        total += flat(late["tensors"].get(name, torch.zeros(p.numel())) for name, p in model.named_parameters())
    return waits + total


def conserved(rank, n, method, first, second):
    """How far what was applied and what is on the way are from the sum of the gradients, before and after a resume."""
    model, ddp, optimizer, handle = known(first, method)
    before, generator = flat(model.parameters()), torch.Generator().manual_seed(5 + rank)
    total, gaps = torch.zeros_like(before), []
    for resumed in (False, True):
        if resumed:
            state, weights = handle.state_dict(), model.state_dict()
            model, ddp, optimizer, handle = known(second, method, weights)
            handle.load_state_dict(state)
            found = handle.state_dict()
            gaps.append(0.0 if all(same(found.get(key), state.get(key)) for key in ("memory", "late")) else 1.0)
        for _ in range(4):
            gradient = gradients(model, generator)
            total += flat(gradient)
            optimizer.zero_grad()
            ddp(gradient).backward()
            optimizer.step()
        applied = (before - flat(model.parameters())) / 0.1
        due = mean(total.clone())
        gaps.append(float((applied + on_the_way(handle, model) - due).norm() / due.norm()))
    handle.finalize()
    return gaps


FORMATS = (torch.contiguous_format, torch.channels_last)
CONSERVING = [BlockSparse("nominated", density=0.1), BlockSparse("topk", density=0.1), Elastic(Dense(), beta=0.0),
              Elastic(NOMINATED, beta=0.3)]  # fmt: skip


@pytest.mark.parametrize("method", CONSERVING, ids=name_of)
@pytest.mark.parametrize("first", FORMATS, ids=str)
def test_no_gradient_goes_to_other_elements_in_another_memory_format(ranks, method, first):
    for second in FORMATS:
        for gaps in ranks(2).run(conserved, method, first, second):
            assert max(gaps) < 1e-5


def estimated(rank, n, first, second):
    """A control variate of gradients that stay the same holds each of their elements, or 0; and momentum likewise."""
    model, ddp, optimizer, handle = known(first, VARIATE)
    gradient = gradients(model, torch.Generator().manual_seed(5 + rank))
    for resumed in (False, True):
        if resumed:
            state, weights = handle.state_dict(), model.state_dict()
            model, ddp, optimizer, handle = known(second, VARIATE, weights)
            handle.load_state_dict(state)
        for _ in range(2):
            optimizer.zero_grad()
            ddp(gradient).backward()
            optimizer.step()
    own, held = handle.state_dict()["memory"]["own"], []
    for (name, p), one in zip(model.named_parameters(), gradient):
        found = own[name].view(p.shape)
        held.append(torch.isclose(found, one, atol=1e-5) | (found == 0))
    return all(bool(one.all()) for one in held), sum(float(one.abs().sum()) for one in own.values()) > 0


@pytest.mark.parametrize("first", FORMATS, ids=str)
def test_a_control_variate_in_another_memory_format(ranks, first):
    for second in FORMATS:
        assert ranks(2).run(estimated, first, second) == [(True, True)] * 2


def delayed(rank, n, first, second):
    """The average under way, applied in the run that made it and in one of another memory format."""
    method, ends = DivideAndShuffle(overlap="delayed"), []
    model, ddp, optimizer, handle = known(first, method)
    generator = torch.Generator().manual_seed(5 + rank)
    for _ in range(3):
        optimizer.zero_grad()
        ddp(gradients(model, generator)).backward()
        optimizer.step()
    state, weights = handle.state_dict(), copy.deepcopy(model.state_dict())
    again, _, _, other = known(second, method, weights)
    again.load_state_dict(weights)  # DDP has given every rank the weights of rank 0
    other.load_state_dict(state)
    for one, replica in ((handle, model), (other, again)):
        one.finalize()
        ends.append(flat(replica.parameters()))
    return torch.equal(*ends), bool(state["pending"])


def test_an_average_under_way_in_another_memory_format(ranks):
    assert ranks(2).run(delayed, *FORMATS) == [(True, True)] * 2
    assert ranks(2).run(delayed, *reversed(FORMATS)) == [(True, True)] * 2
