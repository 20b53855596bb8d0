"""thinwire.advise: it leaves no trace, all ranks get the same, what it rehearses is what is sent; the command line."""
import copy
import os
import random
import socket
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy
import pytest
import thinwire
import torch
import torch.distributed as dist
from models import equal_on_all_ranks, mlp, sgd, step, wrap
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic, advice, candidates
from thinwire.cost import Collective, Link, Local, Start, Wait
from thinwire.rehearsal import Bucket, Echo, rehearse
from torch import nn

METHODS = ["fp16", "powersgd-1", BlockSparse("nominated", density=0.1), DivideAndShuffle(2)]
OPTIONS = [{}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}]


class Noisy(nn.Module):
    """Everything that a forward pass may change: BatchNorm's buffers, and the generators of PyTorch, Python, NumPy."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(40, 64), nn.Linear(64, 40)
        self.norm, self.drop = nn.BatchNorm1d(64), nn.Dropout(0.2)

    def forward(self, x):
        x = self.drop(torch.relu(self.norm(self.first(x))))
        return self.last(x * (1 + 0.01 * random.random() + 0.01 * numpy.random.rand()))  # noqa: NPY002


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    while True:
        x = torch.randn(8, 40, generator=generator)
        yield x, x.roll(1, dims=1)


def loss_fn(ddp, batch):
    return ((ddp(batch[0]) - batch[1]) ** 2).mean()


def seed(rank):
    torch.manual_seed(rank)
    random.seed(rank)
    numpy.random.seed(rank)  # noqa: NPY002


def everything(ddp, optimizer):
    """All that must be as it was, copied."""
    return copy.deepcopy({
        "parameters": list(ddp.parameters()), "buffers": list(ddp.buffers()), "optimizer": optimizer.state_dict(),
        "gradients": [p.grad for p in ddp.parameters()], "hooks": len(ddp._comm_hooks),
        "torch": torch.get_rng_state(), "python": random.getstate(),
        "numpy": numpy.random.get_state()[1],  # noqa: NPY002
        "sync": (ddp.require_backward_grad_sync, ddp.require_forward_param_sync),
        "tensor hooks": [bool(p._backward_hooks) for p in ddp.parameters()], "training": ddp.training,
    })  # fmt: skip


def alike(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return numpy.array_equal(a, b) if isinstance(a, numpy.ndarray) else a == b


def train(rank, ask_after, options):
    """Seven steps, of which the last four with a method; advise, or nothing, after so many. Parameters and buffers."""
    seed(rank)
    model = Noisy()
    ddp = wrap(model, **options)
    optimizer, data, other = torch.optim.AdamW(model.parameters(), lr=0.01), batches(rank), batches(rank + 100)
    for done in range(4):
        if done == ask_after:
            before = everything(ddp, optimizer)
            thinwire.advise(ddp, lambda: next(other), loss_fn, optimizer=optimizer, methods=METHODS, steps=2)
            after = everything(ddp, optimizer)
            for name in before:
                assert alike(before[name], after[name]), name
        if done < 3:
            step(ddp, optimizer, next(data))
    plain = copy.deepcopy([*model.parameters(), *model.buffers()])
    ddp = wrap(model, **options)
    thinwire.attach(ddp, BlockSparse("topk", density=0.2))
    for _ in range(4):
        step(ddp, optimizer, next(data))
    return [*plain, *model.parameters(), *model.buffers()]


def leaves_no_trace(rank, n, ask_after, options):
    unasked, asked = train(rank, None, options), train(rank, ask_after, options)
    assert all(map(torch.equal, unasked, asked))
    assert equal_on_all_ranks(asked[:4])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_asking_leaves_no_trace(ranks, options):
    for ask_after in (0, 1, 3):
        ranks(2).run(leaves_no_trace, ask_after, options, seconds=60)


def attaches_afterwards(rank, n):
    """To the very model that was asked about."""

    def trained(ask):
        model = mlp()
        ddp, optimizer, data = wrap(model), sgd(model), batches(rank)
        if ask:
            thinwire.advise(ddp, lambda: next(batches(rank)), loss_fn, methods=METHODS, steps=1)
        thinwire.attach(ddp, BlockSparse("nominated", density=0.2))
        for _ in range(4):
            step(ddp, optimizer, next(data))
        return list(model.parameters())

    assert all(map(torch.equal, trained(False), trained(True)))


def test_a_method_attached_after_asking_does_what_it_would_have_done(ranks):
    ranks(2).run(attaches_afterwards, seconds=60)


def asks_by_default(rank, n):
    ddp = wrap(mlp())
    return thinwire.advise(ddp, lambda: next(batches(rank)), loss_fn, steps=2)


def test_all_ranks_get_the_same_advice(ranks):
    first, *others = ranks(4).run(asks_by_default, seconds=60)
    assert all(other == first for other in others)
    assert first.ranks == 4 and first.compute_s > 0 and first.link.bytes_per_s > 0
    assert first.rows[0].label == "plain DDP" and first.rows[0].speedup == 1
    asked = [candidates.candidate(what, gloo=True).label for what in candidates.by_default(4)]
    labels = [row.label for row in first.rows]
    assert set(asked) < set(labels) and len(labels) == len(asked) + 1 + advice.HALVED
    assert sum("bfloat16" in label for label in labels) == advice.HALVED
    assert "DivideAndShuffle(2)" in labels and "PyTorch's PowerSGD, rank 4" in labels
    steps = [row.step_s for row in first.rows[1:]]
    assert steps == sorted(steps) and min(steps) > 0
    text = str(first)
    assert all(label in text for label in labels) and text.endswith(first.conclusion)
    assert max(map(len, text.splitlines())) < 200


SENT = [Dense(), BlockSparse(block_size=16), BlockSparse("permuted", block_size=16, wire_dtype=torch.float16),
        BlockSparse("shared", density=0.3, block_size=16), BlockSparse("topk", density=0.1, block_size=16),
        BlockSparse("nominated", density=0.1, block_size=16), BlockSparse(memory="control_variate", block_size=16),
        BlockSparse("topk", density=0.1, block_size=16, warmup_steps=2, ramp_steps=2)]  # fmt: skip


def rehearses(rank, n, method):
    """Bytes of a step as predicted, and as sent."""
    model = mlp()
    ddp = wrap(model)
    row = thinwire.advise(ddp, lambda: next(batches(rank)), loss_fn, methods=[method], steps=1).rows[1]
    handle, optimizer, data, sent = thinwire.attach(ddp, method), sgd(model), batches(rank), []
    for _ in range(6):
        step(ddp, optimizer, next(data))
        sent.append(handle.stats()["bytes_sent"])
    return row.bytes_sent, sent[-1] - sent[-2]


@pytest.mark.parametrize("method", SENT, ids=candidates.label)
def test_what_is_rehearsed_is_what_is_sent(ranks, method):
    for predicted, sent in ranks(3).run(rehearses, method, seconds=60):
        # Of nominations the union counts, which is another one in every step.
        assert predicted == pytest.approx(sent, rel=0.25 if getattr(method, "selection", "") == "nominated" else 0)


def rehearses_power_sgd(rank, n):
    hook = candidates.candidate("powersgd-1", gloo=True)
    echo = Echo(rank, n, dist.group.WORLD, torch.device("cpu"))
    gradient = torch.randn(30 * 20 + 20)
    bucket = Bucket(("w", "b"), [torch.Size([30, 20]), torch.Size([20])], 0, True, gradient.clone())
    return rehearse(hook.make(echo), [bucket], [gradient], echo, 1, hook.skipped)[0][0]


def test_a_chain_of_collectives_is_rehearsed_in_order(ranks):
    """PowerSGD: what stays whole in the hook's body; left factors, then right ones, in its callbacks."""
    script = ranks(2).run(rehearses_power_sgd)[0]
    sizes = [[event.collective.nbytes for event in part if isinstance(event, Start)]
             for part in (script.body, script.after)]  # fmt: skip
    assert sizes == [[4 * 20], [4 * 30, 4 * 20]]
    assert [type(event) for event in script.after] == [Local, Start, Wait] * 2 + [Local]
    assert not any(isinstance(event, Wait) for event in script.body)


def rehearses_waiting(rank, n):
    echo = Echo(rank, n, dist.group.WORLD, torch.device("cpu"))

    def hook(bucket):
        gathered = torch.empty(n, 8)
        dist.all_to_all_single(torch.empty(n, 4), torch.ones(n, 4), group=echo)
        work = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(
            gathered.view(-1), bucket.buffer(), group=echo, async_op=True)  # fmt: skip
        return work.get_future().then(lambda _: gathered.sum(0))

    bucket = Bucket(("w",), [torch.Size([8])], 0, True, torch.ones(8))
    return rehearse(hook, [bucket], [torch.ones(8)], echo, 1, 0)[0][0]


def test_what_a_hook_waits_for_is_told_from_what_it_leaves_under_way(ranks):
    script = ranks(2).run(rehearses_waiting)[0]
    assert [type(event) for event in script.body if not isinstance(event, Local)] == [Start, Wait, Start]
    assert [type(event) for event in script.after] == [Local]
    assert [e.collective for e in script.body if isinstance(e, Start)] == [
        Collective("all_to_all", 32, 2), Collective("all_gather", 32, 2)]  # fmt: skip


def refuses(rank, n, who, arguments, found):
    """All ranks refuse for what one or all of them passed, and the model is as good as new."""
    model = mlp()
    ddp = wrap(model)
    given = {"make_batch": lambda: next(batches(rank)), "loss_fn": loss_fn, "methods": ["fp16"], "steps": 1}
    for name, value in arguments.items():
        if rank in who:
            given[name] = BROKEN.get(value, value) if isinstance(value, str) else value
    with pytest.raises((TypeError, ValueError), match=found):
        thinwire.advise(given.pop("ddp", ddp), **given)
    assert ddp.require_forward_param_sync and ddp.require_backward_grad_sync
    step(ddp, sgd(model), next(batches(rank)))
    assert equal_on_all_ranks(model.parameters())


def _breaks(ddp, batch):
    raise KeyError("no such label")


BROKEN = {"no DDP": nn.Linear(3, 3), "breaks": _breaks, "two losses": lambda ddp, batch: ddp(batch[0])}


@pytest.mark.parametrize("who, arguments, found", [
    ((0, 1), {"ddp": "no DDP"}, "got a Linear.*DistributedDataParallel.*rank 0, 1"),
    ((1,), {"ddp": "no DDP"}, r"got a Linear.*\(rank 1\)"),
    ((0, 1), {"steps": 0}, "steps=0.*at least 1"),
    ((0, 1), {"steps": 2.5}, "steps=2.5.*integer"),
    ((0, 1), {"make_batch": 3}, "make_batch=3.*function"),
    ((0, 1), {"optimizer": 3}, "optimizer=3"),
    ((0, 1), {"methods": []}, "methods=\\[\\].*at least one"),
    ((0, 1), {"methods": ["powersgd-0"]}, "'powersgd-0'.*'powersgd-1'"),
    ((0, 1), {"methods": BlockSparse()}, "must be a list"),
    ((0, 1), {"methods": ["bf16"]}, "Gloo"),
    ((0, 1), {"methods": [Elastic(BlockSparse())]}, "cannot predict Elastic.*ask about BlockSparse"),
    ((1,), {"methods": [BlockSparse()]}, "ranks differ in methods.*fp16.*rank 0.*BlockSparse.*rank 1"),
    ((1,), {"steps": 3}, "ranks differ in steps"),
    ((1,), {"loss_fn": "breaks"}, r"KeyError: 'no such label' \(rank 1\)"),
    ((0, 1), {"loss_fn": "two losses"}, "shape \\[8, 40\\].*one element"),
], ids=str)  # fmt: skip
def test_what_cannot_work_is_refused_on_every_rank(ranks, who, arguments, found):
    ranks(2).run(refuses, who, arguments, found, seconds=30)


def asks_alone(rank, n):
    return thinwire.advise(wrap(mlp()), lambda: next(batches(rank)), loss_fn, steps=2)


def test_one_rank_has_nothing_to_exchange(ranks):
    found = ranks(1).run(asks_alone)[0]
    assert found.best == "plain DDP" and len(found.rows) == 1 and found.link is None
    assert "one rank" in str(found)


def test_without_a_process_group_it_says_what_to_do():
    with pytest.raises(RuntimeError, match="init_process_group"):
        thinwire.advise(nn.Linear(2, 2), lambda: None, loss_fn)


def concluded(compute_s, **steps_s):
    """What is concluded from predictions, by what is asked: fp16, and methods as "sparse" and "heaviest"."""
    methods = {"fp16": "fp16", "sparse": BlockSparse(), "heaviest": BlockSparse("nominated", density=0.01)}
    asked = [candidates.plain(), *(candidates.candidate(methods[name], True) for name in steps_s if name != "plain")]
    times = dict(zip([one.label for one in asked], steps_s.values()))
    tried = SimpleNamespace(predict=lambda one: (times[one.label], 1e6), alone_s=compute_s,
                            link=Link(0.001, 1e6), group=SimpleNamespace(size=lambda: 4))  # fmt: skip
    return advice.conclude(tried, asked, also_halved=False)


def test_the_fastest_is_taken_where_the_network_costs_much():
    found = concluded(0.1, plain=1.0, fp16=0.6, sparse=0.5, heaviest=0.2)
    assert found.best == "BlockSparse('nominated', density=0.01)"
    assert "1000 ms to 200 ms a step, 5.0 times as fast" in found.conclusion and "100 ms" in found.conclusion
    assert [row.verdict for row in found.rows] == ["what you have", "take this", "faster", "faster"]
    assert found.rows[1].speedup == 5


def test_a_cast_is_taken_where_it_is_nearly_as_fast():
    assert concluded(0.1, plain=1.0, fp16=0.51, sparse=0.5).best == "PyTorch's fp16 hook"
    assert concluded(0.1, plain=1.0, fp16=0.55, sparse=0.5).best == "BlockSparse()"


def test_nothing_is_advised_where_the_network_costs_little():
    found = concluded(0.96, plain=1.0, sparse=0.8)
    assert found.best == "plain DDP" and "costs you 4% of a step: nothing here can save more" in str(found)


def test_nothing_is_advised_where_nothing_gains():
    found = concluded(0.5, plain=1.0, sparse=0.98, heaviest=1.2)
    assert found.best == "plain DDP" and "no method here is a tenth faster" in str(found)
    assert [row.verdict for row in found.rows] == ["what you have, and the best", "no gain", "slower"]


def test_labels_are_as_one_would_write_the_method():
    for text in ("BlockSparse()", "BlockSparse('nominated', density=0.01)", "DivideAndShuffle(2)", "Dense()",
                 "BlockSparse('topk', density=0.1, memory='none', wire_dtype=torch.bfloat16)",
                 "DivideAndShuffle(2, blocks=BlockSparse('shared', density=0.2))",
                 "Elastic(BlockSparse(), beta=0.5)"):  # fmt: skip
        names = {"torch": torch} | {name: getattr(thinwire, name) for name in thinwire.__all__}
        assert candidates.label(eval(text, names)) == text


SCRIPT = """
    import sys
    import torch, torch.distributed as dist
    from helper import width  # a module beside the script
    from torch.nn.parallel import DistributedDataParallel as DDP

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = torch.nn.Sequential(torch.nn.Linear(width, 300), torch.nn.ReLU(), torch.nn.Linear(300, width))
    steps, kind = int(sys.argv[1]), sys.argv[2]
    if kind != "no DDP":
        ddp = DDP(model)
    if kind == "hook":
        import thinwire
        thinwire.attach(ddp, thinwire.BlockSparse())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps if kind != "no DDP" else 0):
        optimizer.zero_grad()
        with ddp.no_sync():  # gradient accumulation
            ddp(torch.randn(8, width)).square().mean().backward()
        ddp(torch.randn(8, width)).square().mean().backward()
        optimizer.step()
        if dist.get_rank() == 0:
            torch.save(model.state_dict(), f"after-{step + 1}.pt")
    print("THE SCRIPT WENT ON", flush=True)
"""


def command(folder, *arguments, ranks):
    """Exit status and output of the command line on the script above."""
    (folder / "job").mkdir()
    (folder / "job" / "helper.py").write_text("width = 40\n")
    (folder / "job" / "train.py").write_text(textwrap.dedent(SCRIPT))
    package = os.path.dirname(os.path.dirname(thinwire.__file__))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": package, "GLOO_SOCKET_IFNAME": "lo"}
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        env |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ended = subprocess.run([*start, "-m", "thinwire.advise", *arguments], cwd=folder, env=env, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)  # fmt: skip
    assert "RuntimeWarning" not in ended.stdout, ended.stdout
    return ended.returncode, ended.stdout


def test_the_command_line_advises_and_leaves_the_script(tmp_path):
    status, output = command(tmp_path, "--steps", "3", "job/train.py", "1000", "--batch", ranks=2)
    assert status == 0, output
    assert output.count("plain DDP  ") == 1 and "BlockSparse('nominated', density=0.01)" in output
    assert "on 2 ranks" in output and "THE SCRIPT WENT ON" not in output
    # Checkpoints of equal replicas are the script's own, those of replicas that drift apart are held back.
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [f"after-{i}.pt" for i in (1, 2, 3)]


@pytest.mark.parametrize("arguments, found", [
    (("--steps", "9", "job/train.py", "4", "short"), "ended after 4 steps; 15 are needed to time 9"),
    (("job/train.py", "4", "no DDP"), "without making a DistributedDataParallel"),
    (("job/train.py", "4", "hook"), "registers a communication hook of its own \\(hook\\)"),
], ids=lambda value: value[-1] if isinstance(value, tuple) else "")  # fmt: skip
def test_the_command_line_says_what_is_missing(tmp_path, arguments, found):
    status, output = command(tmp_path, *arguments, ranks=1)
    assert status != 0
    assert any(found.replace("\\", "") in line for line in output.splitlines()), output


def test_the_command_line_refuses_what_is_not_there(tmp_path, capsys):
    from thinwire.advise import main

    for arguments, found in ((["nothing.py"], "no such script"), (["--steps", "0", __file__], "at least 1")):
        with pytest.raises(SystemExit):
            main(arguments)
        assert found in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "torch.save writes nothing" in " ".join(capsys.readouterr().out.split())
