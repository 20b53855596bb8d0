"""The cost model: its formulas against messages that are counted, its timeline by hand, and the fit of scale.py."""
import dataclasses
import itertools
import json

import pytest
import thinwire
import torch
from suite import scale
from suite.methods import CONTESTANTS
from thinwire import BlockSparse, Dense
from thinwire.advice.cost import (
    ALGORITHMS,
    KINDS,
    Collective,
    Compute,
    Link,
    Local,
    Script,
    Start,
    Wait,
    all_reduce,
    exchanges,
    owner_exchange,
    script_time,
    step_time,
)

SHAPES = ((300, 70), (70,), (1000,), (64, 64), (3,))
LINK = Link(latency_s=0.001, bytes_per_s=1e6)


def rounds_of(kind, algorithm, n, nbytes):
    """A collective as rounds of messages (from, to, bytes), with which every rank ends up with what it should."""
    ranks = range(n)
    if kind == "all_to_all":
        yield [(r, s, nbytes / n) for r in ranks for s in ranks if r != s]
    elif (kind, algorithm) == ("all_reduce", "ring"):
        pieces = {r: [{r} for _ in ranks] for r in ranks}  # whose part is in each piece
        for t in range(2 * (n - 1)):
            moved = [(r, (r + 1) % n, (r - t) % n) for r in ranks]
            arriving = [set(pieces[r][piece]) for r, _, piece in moved]
            for (_, to, piece), came in zip(moved, arriving):
                pieces[to][piece] |= came
            yield [(r, to, nbytes / n) for r, to, _ in moved]
        assert all(piece == set(ranks) for mine in pieces.values() for piece in mine)
    elif (kind, algorithm) == ("all_gather", "ring"):
        held = {r: {r} for r in ranks}
        for t in range(n - 1):
            for r in ranks:
                held[(r + 1) % n] |= {(r - t) % n}
            yield [(r, (r + 1) % n, nbytes) for r in ranks]
        assert all(mine == set(ranks) for mine in held.values())
    else:  # recursive doubling, for powers of two
        held, width = {r: {r} for r in ranks}, 1
        while width < n:
            before = {r: set(held[r]) for r in ranks}
            for r in ranks:
                held[r] |= before[r ^ width]
            yield [(r, r ^ width, len(before[r]) * nbytes) for r in ranks]
            width *= 2
        assert all(mine == set(ranks) for mine in held.values())


@pytest.mark.parametrize("kind, algorithm, ranks", [
    ("all_reduce", "ring", (1, 2, 3, 4, 7)), ("all_gather", "ring", (1, 2, 3, 4, 7)),
    ("all_gather", "tree", (2, 4, 8, 16)), ("all_to_all", "ring", (2, 3, 8)),
])  # fmt: skip
def test_hops_and_bytes_are_those_of_counted_messages(kind, algorithm, ranks):
    for n in ranks:
        rounds = list(rounds_of(kind, algorithm, n, 840.0))
        one = Collective(kind, 840.0, n, algorithm)
        assert one.hops == len(rounds)
        for rank in range(n):
            assert one.sent == pytest.approx(sum(size for r in rounds for who, _, size in r if who == rank))
            assert one.sent == pytest.approx(sum(size for r in rounds for _, to, size in r if to == rank))


def test_two_binary_trees_send_twice_the_bytes_at_most():
    """Half of the bytes go through each tree, up and down; an inner rank of the one is a leaf of the other."""
    n, nbytes = 16, 840.0
    sent = [0.0] * n
    for numbering in (lambda i: i, lambda i: n - 1 - i):
        for i in range(1, n):
            sent[numbering(i)] += nbytes / 2  # up
            sent[numbering(i // 2)] += nbytes / 2  # down: node i's parent is i // 2, the root 0 has one child
    assert max(sent) <= Collective("all_reduce", nbytes, n, "tree").sent == 2 * nbytes
    assert Collective("all_reduce", nbytes, n, "tree").hops == 2 * 4


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("method", [
    Dense(), Dense(torch.bfloat16), BlockSparse(), BlockSparse("permuted"), BlockSparse("shared", density=0.1),
    BlockSparse("topk", density=0.02), BlockSparse("nominated", density=0.05, block_size=16),
    BlockSparse("nominated", density=0.05, wire_dtype=torch.bfloat16),
], ids=str)  # fmt: skip
def test_a_methods_collectives_send_what_estimate_says(method, n):
    model = torch.nn.Module()
    for i, shape in enumerate(SHAPES):
        model.register_parameter(str(i), torch.nn.Parameter(torch.empty(shape, device="meta")))
    found = exchanges(method, [p.numel() for p in model.parameters()], n)
    assert sum(one.sent for one in found) == pytest.approx(thinwire.estimate(method, model, n)["bytes_sent"])


def test_more_bytes_ranks_or_latency_are_never_faster():
    slow = (dataclasses.replace(LINK, latency_s=0.002), dataclasses.replace(LINK, bytes_per_s=5e5),
            dataclasses.replace(LINK, all_to_all=0.5))  # fmt: skip
    for kind, algorithm, n in itertools.product(KINDS, ALGORITHMS, range(1, 9)):
        one = Collective(kind, 1e5, n, algorithm)
        assert Collective(kind, 2e5, n, algorithm).seconds(LINK) >= one.seconds(LINK)
        assert Collective(kind, 1e5, n + 1, algorithm).seconds(LINK) >= one.seconds(LINK)
        assert all(one.seconds(slower) >= one.seconds(LINK) for slower in slow)
        assert n > 1 or one.seconds(LINK) == 0
    assert Collective("all_to_all", 1e5, 4).seconds(slow[2]) > Collective("all_to_all", 1e5, 4).seconds(LINK)


def test_a_tree_wins_where_latency_counts_and_a_ring_where_bytes_do():
    few, many = all_reduce(8, 256), all_reduce(1e9, 256)
    assert few[0].seconds(LINK) > dataclasses.replace(few[0], algorithm="tree").seconds(LINK)
    assert many[0].seconds(LINK) < dataclasses.replace(many[0], algorithm="tree").seconds(LINK)


def test_a_step_by_hand():
    """Two buckets, ready at 1 s and 2 s of a step of 3 s; a link of 1 MB/s without latency."""
    link, compute = Link(0.0, 1e6), Compute((1.0, 2.0), 3.0)
    sends = lambda megabytes: Start(Collective("all_gather", 1e6 * megabytes, 2))
    assert step_time(compute, [Script(), Script()], link) == 3.0
    # The first second of the first bucket's exchange is hidden, the rest and the second's are not: 1 + 1.5 + 0.5.
    assert step_time(compute, [Script((sends(1.5),)), Script((sends(0.5),))], link) == pytest.approx(4.0)
    # A bucket that is done before the backward pass costs nothing.
    assert step_time(compute, [Script((sends(0.5),)), Script()], link) == pytest.approx(3.0)
    # What the hook waits for delays the backward pass, and so does its own work.
    assert step_time(compute, [Script((Local(0.25), sends(0.5), Wait())), Script()], link) == pytest.approx(3.75)
    # Decoding begins when its bucket is there.
    decoding = Script((sends(1.0),), (Local(0.5),))
    assert step_time(compute, [decoding, decoding], link) == pytest.approx(4.5)
    # A callback's own collective waits its turn.
    chain = Script((sends(1.0),), (Local(0.5), sends(1.0), Wait()))
    assert step_time(compute.in_one_bucket(), [chain], link) == pytest.approx(5.5)
    # Callbacks share a processor: one has it from 2 to 3, the other, there at 2.5, from then on.
    one, other = Script((sends(1.0),), (Local(1.0),)), Script((sends(0.5),), (Local(0.5),))
    assert step_time(compute, [one, other], link) == pytest.approx(4.5)
    # And while one waits, another has it: 2 to 2.25 decode, 2.25 to 2.75 decode the other, 3.25 to 3.5 the rest.
    chain = Script((sends(1.0),), (Local(0.25), sends(1.0), Wait(), Local(0.25)))
    other = Script((sends(0.1),), (Local(0.5),))
    assert step_time(compute, [chain, other], link) == pytest.approx(4.5)
    # Averaging replicas comes after all of the step.
    assert step_time(compute, [Script()] * 2, link, Script((sends(1.0),), (Local(0.25),))) == pytest.approx(4.25)


def test_a_script_by_hand():
    """Its own work, and what it starts and waits for, one after the other on a link of 1 MB/s without latency."""
    sends = lambda megabytes: Start(Collective("all_gather", 1e6 * megabytes, 2))
    link = Link(0.0, 1e6)
    assert script_time(Script(), link) == 0
    assert script_time(Script((Local(0.25),)), link) == pytest.approx(0.25)
    assert script_time(Script((Local(0.25), sends(1.0)), (Local(0.5),)), link) == pytest.approx(1.75)
    chain = (sends(1.0), Wait(), Local(0.5), sends(2.0))
    assert script_time(Script((Local(0.25),), chain), link) == pytest.approx(3.75)


def test_latencies_of_what_is_under_way_at_once_overlap():
    link = Link(0.1, 1e6)
    three = Script(tuple(Start(Collective("all_gather", 1e5, 2)) for _ in range(3)) + (Wait(),))
    assert step_time(Compute((1.0,), 1.0), [three], link) == pytest.approx(1.0 + 0.3 + 0.1)


def test_what_cannot_be_is_refused():
    for wrong in (lambda: Link(-1, 1), lambda: Link(0, 0), lambda: Link(0, 1, 0), lambda: Collective("gossip", 1, 2),
                  lambda: Collective("all_reduce", -1, 2), lambda: Collective("all_reduce", 1, 0),
                  lambda: Compute((), 1), lambda: Compute((2.0, 1.0), 3.0), lambda: Compute((2.0,), 1.0)):  # fmt: skip
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(TypeError):
        exchanges(thinwire.DivideAndShuffle(), (10,), 2)


TRUE = scale.Fit(0.0004, 1.02, 4e-9, 0.3, 0.2, {"dense": 2e-9, "fp16": 5e-9, "powersgd-1": 9e-9, "independent": 3e-9,
                 "topk-1": 6e-9, "nominated-1": 5e-9}, {}, cores=2)  # fmt: skip
BYTES = {"dense": 4.0, "fp16": 2.0, "powersgd-1": 0.02, "independent": 1.05, "topk-1": 1.05, "nominated-1": 1.05}


def speed_rows(ranks=(2, 4, 8), rates=(50.0, 100.0, 1000.0), elements=1_000_000, task="t"):
    """Rows as the suite writes them, of steps that the model takes exactly."""
    true = dataclasses.replace(TRUE, scale={(task, method): factor for method, factor in BYTES.items()})
    for n, mbit in itertools.product(ranks, rates):
        compute = 0.1 * max(1, n / 2)
        common = {"kind": "speed", "task": task, "ranks": n, "mbit": mbit, "parameters": elements}
        yield common | {"method": "noop", "label": "noop", "step_ms": {"median": 1e3 * compute}, "sent_bytes": 0}
        for method, factor in BYTES.items():
            case = scale.Case(task, method, method, n, mbit, elements, compute, 0.0, 0.0, None)
            sent = factor * sum(one.sent for one in scale.kind_of(method).law(elements, n, "ring"))
            local = 1e3 * TRUE.local_s[method] * max(1, n / 2) * 4 * elements
            ours = {"encode_ms": 0.75 * local, "decode_ms": 0.25 * local, "exchange_ms": 1.0}
            yield common | {"method": method, "label": method, "step_ms": {"median": 1e3 * true.step_s(case, n)},
                            "sent_bytes": sent} | (ours if method[0] in "itn" else {})  # fmt: skip


def test_the_fit_finds_the_parameters_that_made_the_rows_and_predicts_the_others():
    cases, unknown = scale.cases_of(list(speed_rows()))
    assert unknown == [] and len(cases) == 9 * len(BYTES)
    used = [case for case in cases if case.ranks < 8 and case.mbit != 100]
    found = scale.fit(used, cores=2)
    for name, tolerance in (("latency_s", 0.05), ("wire", 0.02), ("cpu_s", 0.1), ("all_to_all", 0.2), ("hidden", 0.2)):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=tolerance), name
    for method, seconds in TRUE.local_s.items():
        assert found.local_s[method] == pytest.approx(seconds, rel=0.2), method
    assert found.scale["t", "dense"] == pytest.approx(4.0)
    rows = scale.checked(cases, found, used)
    assert sum(row["fitted"] for row in rows) == len(used) < len(rows)
    assert max(abs(row["error"]) for row in rows) < 0.02
    for row, case in zip(rows, cases):
        apart, added = row["predicted_ms"] - row["measured_ms"], row["measured_ms"] - 1e3 * case.compute_s
        assert row["added_error"] == pytest.approx(apart / added)


def test_projections_grow_with_the_ranks_and_do_not_share_cores():
    cases, _ = scale.cases_of(list(speed_rows()))
    found = scale.fit(cases, cores=2)
    for row in scale.projected(cases, found, "t"):
        assert list(row["ranks"]) == [2**i for i in range(1, 11)]
        assert row["compute_ms"] == pytest.approx(100)
        if row["method"] in ("topk-1", "dense", "powersgd-1"):
            assert row["step_ms"] == sorted(row["step_ms"])
        if row["method"] == "powersgd-1" and row["algorithm"] == "ring":
            law = scale.kind_of("powersgd-1").law(1_000_000, 1024, "ring")
            sent = BYTES["powersgd-1"] * sum(one.sent for one in law)
            alone = 0.1 + found.local_s["powersgd-1"] * 4e6 + found.latency_s * sum(one.hops for one in law)
            exchange = sent * (found.wire / (1e6 * row["mbit"] / 8) + found.cpu_s)
            assert row["step_ms"][-1] == pytest.approx(1e3 * (alone + exchange))
        assert min(row["step_ms"]) > row["compute_ms"]


def test_what_the_model_has_no_law_for_is_named_and_left_out(tmp_path, capsys, monkeypatch):
    rows = list(speed_rows())
    odd = {"kind": "speed", "task": "t", "ranks": 4, "mbit": 100.0, "parameters": 10_000, "step_ms": {"median": 1.0},
           "sent_bytes": 1.0, "label": "?"}  # fmt: skip
    rows += [odd | {"method": "elastic"}, odd | {"method": "dense", "mbit": 0.0}]
    rows += [odd | {"method": "dense", "kind": "train"}]
    rows += speed_rows(elements=62, task="small")
    of = {"machine": {}, "versions": {}, "code": "this", "data": "this"}
    old = rows[1] | of | {"code": "another", "method": "fp16-of-old"}
    lines = [json.dumps(row) for row in (old, *(row | of for row in rows))]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr("sys.argv", ["scale.py", "--rows", str(tmp_path / "train.jsonl"), "--out", str(tmp_path)])
    scale.main()
    said = capsys.readouterr()
    assert "elastic" in said.err and "dense" not in said.err and "fp16-of-old" not in said.err
    record = json.loads((tmp_path / "scale.json").read_text())
    assert {row["method"] for row in record["rows"]} == set(BYTES)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    said = scale.footer(record)
    assert "A model, not a measurement" in said and "topk's decoding does" in said
    assert "Models under 10000 parameters are not fitted" in said and "of 54 runs are within 20 %" in said
    assert {row["task"] for row in record["rows"] if row["fitted"]} == {"t"}
    assert "computation in each is not predicted but the step that was measured there" in said
    heads, cells = scale.table(record)
    assert len(cells) == len(BYTES) and all(len(row) == len(heads) for row in cells)


def test_methods_of_the_suite_have_a_law():
    without = {method for method in CONTESTANTS if scale.kind_of(method) is None}
    assert without == {"noop", "ds-sync-delayed", "elastic", "elastic-nominated", "horovod-nominated-4"}
    for method in set(CONTESTANTS) - without:
        of_two, of_many = (scale.kind_of(method).law(1_000_000, n, "ring") for n in (2, 1024))
        assert of_two and sum(one.sent for one in of_two) > 0, method
        assert sum(one.sent for one in of_many) >= sum(one.sent for one in of_two), method


def test_owners_exchange_sends_as_much_as_a_ring_all_reduce():
    assert sum(one.sent for one in owner_exchange(840, 4)) == all_reduce(840, 4)[0].sent
