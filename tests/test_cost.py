"""The cost model: its formulas against messages that are counted, its timeline by hand, and the fit of scale.py."""
import dataclasses
import itertools
import json

import pytest
import thinwire
import torch
from suite import networks, scale
from suite.tasks import MAIN
from suite.ways import WAYS
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
    # One that takes turns waits until the other is done: 2 to 2.25 decode, 1 s of sending, 0.25 decode, 0.5 decode.
    chain, other = (dataclasses.replace(script, in_turn=True) for script in (chain, other))
    assert step_time(compute, [chain, other], link) == pytest.approx(5.0)
    assert step_time(compute, [chain, Script()], link) == pytest.approx(4.5)
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


def test_what_a_backend_has_no_thread_for_waits_with_its_latency():
    """Three at once of 0.1 s latency and 0.1 s on the wire, of which two may be under way: the third begins when the
    first has ended, after 0.2 s, and ends 0.2 s later."""
    three = Script(tuple(Start(Collective("all_gather", 1e5, 2)) for _ in range(3)) + (Wait(),))
    at = lambda at_once: script_time(three, Link(0.1, 1e6, at_once=at_once))
    assert [at(n) for n in (1, 2, 3, 8)] == pytest.approx([0.6, 0.4, 0.4, 0.4])
    short = Script(tuple(Start(Collective("all_gather", 0, 2)) for _ in range(8)))
    assert script_time(short, Link(0.1, 1e6, at_once=2)) == pytest.approx(0.4)
    assert script_time(short, Link(0.1, 1e6)) == pytest.approx(0.1)


def test_what_cannot_be_is_refused():
    for wrong in (lambda: Link(-1, 1), lambda: Link(0, 0), lambda: Link(0, 1, 0), lambda: Link(0, 1, 1, 0),
                  lambda: Collective("gossip", 1, 2), lambda: Collective("all_reduce", -1, 2),
                  lambda: Collective("all_reduce", 1, 0),
                  lambda: Compute((), 1), lambda: Compute((2.0, 1.0), 3.0), lambda: Compute((2.0,), 1.0)):  # fmt: skip
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(TypeError):
        exchanges(thinwire.DivideAndShuffle(), (10,), 2)


OWN = {"ddp": 2e-9, "accumulation-4": 4e-9, "powersgd-1": 9e-9, "independent": 3e-9, "topk-1": 6e-9,
       "nominated-4-int4": 5e-9, "local-8": 7e-9}  # fmt: skip
TRUE = scale.Fit(0.0004, 1.8, 4e-9, 0.3, 0.2, OWN, {}, cores=2)
BYTES = dict.fromkeys(OWN, 1.05) | {"ddp": 4.0, "accumulation-4": 4.0, "powersgd-1": 0.02}
NETWORKS = [(ranks, mbit, delay) for ranks in (2, 4, 8) for mbit in (50.0, 100.0, 1000.0) for delay in (0.1, 10, 50)]


def step_times(networks=NETWORKS, model=MAIN, factor=1.0):
    """Rows as steps.py writes them, of steps that the cost model takes exactly."""
    true = dataclasses.replace(TRUE, scale={(model, way): factor for way, factor in BYTES.items()})
    for n, mbit, delay in networks:
        compute = 0.1 * max(1, n / 2)
        turns = [{"cycle": 0, "method": "alone", "ms": [1.0], "last_ms": 1e3 * compute, "sent": 9}]
        for way, constant in BYTES.items():
            case = scale.Case(model, way, n, mbit, delay / 1e3, compute)
            sent = constant * sum(one.sent for one in case.collectives()) / WAYS[way].every
            step = factor * true.step_s(case)
            turns += [{"cycle": i, "method": way, "ms": [1.0], "last_ms": 1e3 * step * apart, "sent": sent}
                      for i, apart in enumerate((0.99, 1.01))]  # fmt: skip
        yield {"model": model, "ranks": n, "mbit": mbit, "delay_ms": delay, "delayed_by": None, "turns": turns}


def test_the_fit_finds_the_parameters_that_made_the_rows_and_predicts_the_others():
    cases, unknown = scale.cases_of([*step_times(factor=2.0), *step_times()])  # of each network the newest row counts
    assert unknown == [] and len(cases) == len(NETWORKS) * len(BYTES)
    used = [case for case in cases if case.ranks == 4 and case.mbit != 100 and case.delay_s != 0.01]
    found = scale.fit(used, cores=2)
    for name, tolerance in (("base_s", 0.05), ("trips", 0.02), ("cpu_s", 0.1), ("all_to_all", 0.2), ("hidden", 0.2)):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=tolerance), name
    for way, seconds in OWN.items():
        assert found.own_s[way] == pytest.approx(seconds, rel=0.2), way
    assert found.scale[MAIN, "ddp"] == pytest.approx(4.0)
    rows = scale.checked(cases, found, used)
    assert sum(row["fitted"] for row in rows) == len(used) < len(rows)
    assert max(abs(row["error"]) for row in rows) < 0.02
    for row, case in zip(rows, cases):
        apart, added = row["predicted_ms"] - row["measured_ms"], row["measured_ms"] - 1e3 * case.compute_s
        assert row["added_error"] == pytest.approx(apart / added)


def test_a_step_of_the_model_by_hand():
    """Four ranks on two cores, all that each sends and waits for."""
    true = dataclasses.replace(TRUE, scale={(MAIN, way): factor for way, factor in BYTES.items()})
    at = lambda way, **other: scale.Case(MAIN, way, 4, 100.0, 0.05, 0.1, **other)
    elements = at("ddp").gradient / 4
    wire = lambda nbytes, more=0.0: nbytes * (8e-8 * (1 + more) + 2 * 4e-9)
    own = lambda way: 2 * OWN[way] * 4 * elements
    waits = lambda hops: hops * (2 * 0.0004 + 1.8 * 0.05)
    sent = 4.0 * 1.5 * elements
    hidden = min(wire(sent) * scale.FIRST_BUCKET / (4 * elements), 0.2 * 0.1)
    ddp = waits(6) + wire(sent) + own("ddp") - hidden
    assert true.step_s(at("ddp")) == pytest.approx(0.1 + ddp)
    # Idle links begin anew. A fourth of the gradient, 460 kB, takes ten frames and as many round trips as doublings;
    # a link holds 1.25 MB.
    for window, trips in ((scale.WINDOW["Ethernet"], 5), (scale.WINDOW["relay"], 3)):
        step = true.step_s(at("accumulation-4", window=window))
        assert step == pytest.approx(0.1 + (ddp - own("ddp") + own("accumulation-4") + trips * 0.1) / 4)
    assert scale.slow_start_s(at("ddp"), 1e9) == pytest.approx(0.7)  # 14 kB, 28, ... 1.9 MB hold the link's 1.25 MB
    assert scale.slow_start_s(at("ddp"), 14_000) == 0
    sent = 0.02 * 1.5 * elements
    assert true.step_s(at("powersgd-1")) == pytest.approx(0.1 + waits(18) + 2 * wire(sent) + own("powersgd-1"))
    # Local steps hide behind one step what they exchange, but not their own work.
    fast = scale.Case(MAIN, "local-8", 4, 1000.0, 0.0, 0.1)
    assert true.step_s(fast) == pytest.approx(0.1 + own("local-8") / 8)
    assert true.step_s(at("local-8")) > 0.1 + own("local-8") / 8


def test_projections_grow_with_the_ranks_and_do_not_share_cores():
    cases, _ = scale.cases_of(list(step_times()))
    found = scale.fit(cases, cores=2)
    rows = scale.projected(cases, found, MAIN)
    assert {(row["mbit"], row["algorithm"]) for row in rows} == set(itertools.product(scale.RATES, ALGORITHMS))
    for row in rows:
        assert list(row["ranks"]) == [2**i for i in range(1, 9)]
        assert row["compute_ms"] == pytest.approx(100)
        if row["way"] in ("topk-1", "ddp", "powersgd-1"):
            assert row["step_ms"] == sorted(row["step_ms"])
        if row["way"] == "powersgd-1" and row["algorithm"] == "ring":
            law = scale.Case(MAIN, "powersgd-1", 256, row["mbit"], 0.01, 0.1).collectives()
            sent = found.scale[MAIN, "powersgd-1"] * sum(one.sent for one in law)
            waits = (found.base_s + found.trips * 0.01) * sum(one.hops for one in law)
            own = found.own_s["powersgd-1"] * cases[0].gradient
            exchange = waits + sent * (8e-6 / row["mbit"] + found.cpu_s)
            assert row["step_ms"][-1] == pytest.approx(1e3 * (0.1 + own + exchange))
        assert min(row["step_ms"]) > row["compute_ms"]


def test_the_fastest_are_told_with_the_ranks_at_which_that_changes():
    row = lambda way, *steps: {"way": way, "mbit": 100.0, "algorithm": "ring", "ranks": scale.RANKS, "step_ms": steps}
    record = {"projected": [row("ddp", 1, 9, 9, 9, 9, 9, 9, 9), row("topk-1", 2, 2, 2, 2, 8, 8, 8, 8),
                            row("independent", *[3] * 8), row("local-16", *[2.5] * 8)]}  # fmt: skip
    assert scale.fastest(record, 100.0, "ring") == [(2, "ddp"), (4, "topk-1"), (32, "local-16")]
    assert scale.fastest(record, 100.0, "ring", True) == [(2, "ddp"), (4, "topk-1"), (32, "independent")]
    assert scale.fastest(record, 250.0, "ring") == []


def test_the_script_fits_some_networks_and_names_what_it_has_no_law_for(tmp_path, capsys, monkeypatch):
    rows = list(step_times())
    odd = {"cycle": 0, "ms": [1.0], "last_ms": 1.0, "sent": 1.0}
    rows[0]["turns"].append(odd | {"method": "elastic-nominated"})
    rows.append(rows[0] | {"mbit": 250.0, "turns": [odd | {"method": "ddp"}]})  # interrupted before any other turn
    (tmp_path / "rows").write_text("\n".join(json.dumps(row) for row in rows))

    def run(*options):
        monkeypatch.setattr("sys.argv", ["scale.py", "--rows", str(tmp_path / "rows"), "--out", str(tmp_path),
                                         *options])  # fmt: skip
        scale.main()
        return capsys.readouterr()

    said = run()
    assert "elastic-nominated" in said.err and "ddp" not in said.err
    record = json.loads((tmp_path / "scale.json").read_text())
    assert {row["way"] for row in record["rows"]} == set(BYTES)
    assert {(row["ranks"], row["mbit"], row["delay_ms"]) for row in record["rows"] if row["fitted"]} == {
        (4, mbit, delay) for mbit in (50, 1000) for delay in (0.1, 10)}  # fmt: skip
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    said = scale.footer(record)
    unseen = (len(NETWORKS) - 4) * len(BYTES)
    assert "A model, not a measurement" in said and "topk's decoding does" in said
    assert f"of their {unseen} steps {unseen} are within 20 %" in said and "250 Mbit/s, tree: " in said
    assert "not predicted but the step that was measured there without any exchange" in said
    heads, cells = scale.table(record, 100.0)
    assert len(cells) == len(BYTES) and all(len(row) == len(heads) for row in cells)
    with pytest.raises(SystemExit, match="choose --fit-ranks.*bytes-adamw, 4 ranks, 50 Mbit/s, 10 ms"):
        run("--fit-ranks", "16")


def test_of_gradients_in_buckets_and_in_one_the_law_is_for_one_wave():
    row = next(step_times([(4, 100.0, 10.0)]))
    turn = lambda method, ms: {"cycle": 0, "method": method, "last_ms": ms, "ms": [ms], "sent": 1.0}
    row["turns"] += [turn("nominated-16-int4", 200.0), turn("nominated-16-int4" + networks.IN_ONE, 150.0),
                     turn("fp16", 120.0), turn("fp16" + networks.IN_ONE, 110.0)]  # fmt: skip
    cases = {case.way: case.step_s for case in scale.cases_of([row])[0]}
    assert cases["nominated-16-int4"] == pytest.approx(0.15) and cases["fp16"] == pytest.approx(0.12)


def test_ways_whose_steps_are_timed_have_a_law():
    for way in {method.removesuffix(networks.IN_ONE) for method in (*networks.TIMED, *networks.FEWER)}:
        of_two, of_many = (scale.Case(MAIN, way, n, 100.0, 0.0, 0.1).collectives() for n in (2, 256))
        assert of_two and sum(one.sent for one in of_two) > 0, way
        assert sum(one.sent for one in of_many) >= sum(one.sent for one in of_two), way


def test_owners_exchange_sends_as_much_as_a_ring_all_reduce():
    assert sum(one.sent for one in owner_exchange(840, 4)) == all_reduce(840, 4)[0].sent
