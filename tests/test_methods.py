"""Methods are values: compared, hashed, printed; and wrong ones cannot be made."""

import math
import pickle

import pytest
import thinwire
import torch
from thinwire import BlockSparse, Dense
from thinwire.core.blocks import Layout
from thinwire.core.selection import named_by_rank


def test_methods_are_values():
    assert BlockSparse() == BlockSparse() and hash(BlockSparse()) == hash(BlockSparse())
    assert BlockSparse() != BlockSparse(seed=1)
    assert BlockSparse() == BlockSparse(memory="none")
    assert BlockSparse("topk").memory == BlockSparse("nominated").memory == "error_feedback"
    assert eval(repr(BlockSparse("topk", density=0.1)), {"BlockSparse": BlockSparse, "torch": torch}) == BlockSparse(
        "topk", density=0.1
    )
    assert pickle.loads(pickle.dumps(BlockSparse("shared"))) == BlockSparse("shared")
    with pytest.raises(AttributeError):
        BlockSparse().density = 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"density": 0}, ValueError, r"density=0\).*\(0, 1\]"),
        ({"density": 2}, ValueError, r"density=2\)"),
        ({"density": -0.1}, ValueError, "density=-0.1"),
        ({"density": math.nan}, ValueError, "density=nan"),
        ({"density": "all"}, TypeError, "density='all'"),
        ({"density": True}, TypeError, "density=True"),
        ({"block_size": 0}, ValueError, "block_size=0.*at least 1"),
        ({"block_size": 64.0}, TypeError, "block_size=64.0"),
        ({"selection": "random"}, ValueError, "selection='random'.*independent"),
        ({"memory": "ef"}, ValueError, "memory='ef'.*error_feedback"),
        ({"wire_dtype": torch.float64}, ValueError, "wire_dtype=torch.float64.*torch.bfloat16"),
        ({"wire_dtype": "bf16"}, ValueError, "wire_dtype='bf16'"),
        ({"momentum": 1.0, "memory": "error_feedback"}, ValueError, "momentum=1.0"),
        ({"momentum": 0.9}, ValueError, "needs.*error_feedback"),
        ({"selection": "topk", "memory": "control_variate"}, ValueError, "unbiased only for blocks drawn at random"),
        ({"selection": "nominated", "memory": "control_variate"}, ValueError, "unbiased only"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps=-1"),
        ({"ramp_steps": 1.5}, TypeError, "ramp_steps=1.5"),
        ({"dense_below": -1}, ValueError, "dense_below=-1"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": 2**63}, ValueError, "seed=9223372036854775808"),
    ],
)
def test_wrong_values_are_refused_with_what_is_allowed(arguments, error, says):
    with pytest.raises(error, match=says):
        BlockSparse(**arguments)


def test_dense_checks_its_wire():
    with pytest.raises(ValueError, match="wire_dtype=torch.int8"):
        Dense(torch.int8)


def test_density_warms_up_then_falls_geometrically():
    method = BlockSparse("topk", density=0.01, warmup_steps=3, ramp_steps=4)
    densities = [method.density_at(step, world_size=8) for step in range(9)]
    assert densities[:3] == [1.0] * 3
    ratios = [later / earlier for earlier, later in zip(densities[2:], densities[3:8], strict=False)]
    assert ratios == pytest.approx([0.01 ** (1 / 5)] * 5)
    assert densities[7] == pytest.approx(0.01) and densities[8] == 0.01


def test_default_density_is_one_over_world_size():
    assert [BlockSparse().density_at(0, n) for n in (1, 2, 8)] == [1, 1 / 2, 1 / 8]


def test_counts_send_small_parameters_whole_and_something_of_every_one():
    method = BlockSparse("topk", density=0.01, block_size=10, dense_below=50)
    assert method.counts_at(0, 4, (49, 50, 5000, 1, 0)) == (5, 1, 5, 1, 0)


@pytest.mark.parametrize("n", range(2, 18))
@pytest.mark.parametrize("numel", [300, 999, 6400])
def test_permuted_ranks_never_share_a_block_at_the_default_density(n, numel):
    method = BlockSparse("permuted", block_size=16)
    (count,) = method.counts_at(0, n, (numel,))
    assert count * n <= -(-numel // 16)


def test_a_class_is_not_a_method():
    with pytest.raises(TypeError, match=r"call it: thinwire.BlockSparse\(\)"):
        thinwire.HookState(BlockSparse, torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="'topk'"):
        thinwire.HookState("topk", torch.nn.Linear(2, 2))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_ranks_take_turns_in_nominating_what_does_not_divide(n):
    """Every step names what the density allows, and n steps give every rank as many places."""
    names, numels = ("a", "b", "c"), (1000, 700, 5000)
    slots = Layout(names, numels, 16).slots(BlockSparse("nominated", density=0.1).counts_at(0, n, numels))
    quotas = torch.stack([named_by_rank(slots, step, n) for step in range(n)])
    assert (quotas.sum(1) == torch.tensor(slots.counts)).all()
    assert (quotas.sum(0) == torch.tensor(slots.counts)).all()
    assert (quotas[0] != quotas[1]).any()
