"""Random numbers: Philox, the CPU generator, variation seeds and Brownian-tree noise.

The reference vectors come from the published generators, not from this package: the Philox of
AUTOMATIC1111, torch's CPU generator and torchsde 0.2.6.
"""

from __future__ import annotations

import gc
import itertools
import math
import threading
import weakref

import numpy as np
import pytest
import torch
import torchsde
from tests.support.transfers import Transfers

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.samplers import SCHEDULERS
from alphalayer.engine.sampling.brownian_tree import BrownianNoise, BrownianTree
from alphalayer.engine.sampling.noise import (
    ImageGenerator,
    initial_noise,
    randn,
    slerp,
)
from alphalayer.engine.sampling.philox import normal_in_torch, philox_normal
from alphalayer.engine.sampling.samplers import brownian_intervals
from alphalayer.engine.sampling.schedules import SigmaTable, sigmas_for

LATENT = (4, 128, 128)
TABLE = SigmaTable.from_betas()
KARRAS = sigmas_for("Karras", 20, TABLE)

# the vectors are printed with five to seven decimals
PRINTED = {"rtol": 0, "atol": 1e-5}
# A value of the tree is a sum of about twenty float32 terms of size up to 15. torchsde adds them in
# another order.
TREE = {"rtol": 0, "atol": 2e-5}


def _values(tensor: torch.Tensor, count: int = 4) -> list[float]:
    return tensor.flatten()[:count].tolist()


def _randn(seed: int, *rest) -> torch.Tensor:
    return randn([seed], *rest)[0]


# --- Philox


def test_philox_equals_published_values():
    expected = [
        -0.92466,
        -0.42534,
        -2.64385,
        0.14518,
        -0.12087,
        -0.57973,
        -0.62285,
        -0.32839,
        -1.07454,
        -0.36314,
        -1.67105,
        2.26551,
    ]
    np.testing.assert_allclose(_randn(0, (3, 4), "nv").flatten(), expected, **PRINTED)


def test_philox_latent_equals_published_values():
    generator = ImageGenerator(12345, "nv")
    first = generator.randn(LATENT)
    np.testing.assert_allclose(
        _values(first), [0.5786413, -0.5247555, -0.29190373, 0.01401389], rtol=0, atol=1e-7
    )
    np.testing.assert_allclose(first.flatten()[-2:], [0.1922484, 1.1355306], rtol=0, atol=1e-7)
    # the sum is printed with five decimals
    assert float(first.double().sum()) == pytest.approx(-590.37853, abs=1e-4)
    np.testing.assert_allclose(
        _values(generator.randn(LATENT), 2), [2.7012851, -0.7103896], rtol=0, atol=1e-7
    )


def _philox_4x32_10(counter: list[int], key: list[int]) -> list[int]:
    """Evaluate the paper's round function on plain integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_integer_reference_passes_the_test_of_random123():
    assert _philox_4x32_10([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1, 2**63 + 6])
@pytest.mark.parametrize("call", [0, 1, 5])
def test_philox_large_seeds_and_later_calls_follow_the_formula(seed: int, call: int):
    expected = []
    for element in range(20):
        g = _philox_4x32_10([call, 0, element, 0], [seed % 2**32, seed >> 32])
        a, b = float(np.float32(2.3283064e-10)), float(np.float32(2.3283064e-10 * 6.2831855))
        expected.append(math.sqrt(-2 * math.log(g[0] * a + a / 2)) * math.sin(g[1] * b + b / 2))
    # float64 on both sides, rounded to float32 once
    np.testing.assert_allclose(
        philox_normal([seed], 20, call)[0], np.float32(expected), rtol=2e-7, atol=0
    )


def test_philox_many_seeds_equal_single_seeds():
    seeds = [0, 7, 2**40 + 7, 2**63 + 6]
    for values, seed in zip(philox_normal(seeds, 50, 3), seeds, strict=True):
        assert torch.equal(values, philox_normal([seed], 50, 3)[0])


@pytest.mark.parametrize(("seeds", "count"), [(40, 3), (9, 4096), (2, 40_000), (3, 16_384)])
def test_philox_on_the_cpu_equals_torch_operations_bit_for_bit(seeds: int, count: int):
    """Compare the groups on the CPU with whole tensors, which a GPU uses."""
    many = [7 + index * 0x9E3779B97F4A7C1 for index in range(seeds)]
    assert torch.equal(philox_normal(many, count, 2), normal_in_torch(many, count, 2, "cpu"))


def test_philox_is_independent_of_the_shape():
    assert torch.equal(_randn(7, (2, 3, 5), "nv").flatten(), _randn(7, (30,), "nv"))


# --- CPU and GPU sources


def test_cpu_noise_equals_torch_and_depends_on_the_shape():
    # printed with four decimals
    np.testing.assert_allclose(
        _values(_randn(12345, LATENT, "cpu")), [-1.4798, 0.4873, -3.0128, 0.4439], rtol=0, atol=1e-4
    )
    assert _randn(12345, (4,), "cpu")[0].item() == pytest.approx(1.4271, abs=1e-4)


def test_gpu_noise_on_the_cpu_is_refused():
    with pytest.raises(InvalidRequest) as error:
        ImageGenerator(1, "gpu", "cpu")
    assert error.value.field == "noise"


@pytest.mark.parametrize("source", ["nv", "cpu"])
def test_initial_noise_is_equal_alone_and_in_a_batch(source):
    shape = (4, 8, 8)
    batch = initial_noise([ImageGenerator(seed, source) for seed in (5, 6, 7)], shape)
    for i, seed in enumerate((5, 6, 7)):
        assert torch.equal(batch[i], initial_noise([ImageGenerator(seed, source)], shape)[0])


# --- variation seeds


def test_slerp_strengths_0_and_1_return_both_noises():
    low, high = _randn(1, (4, 8, 6), "nv"), _randn(2, (4, 8, 6), "nv")
    # sines of float32 angles
    torch.testing.assert_close(slerp(0.0, low, high), low, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slerp(1.0, low, high), high, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.8])
def test_slerp_rotates_each_column_by_a_share_of_the_angle(strength: float):
    """Compare with the great circle through unit vectors along the height axis."""

    def unit(x):
        return x / x.norm(dim=1, keepdim=True)

    low, high = unit(_randn(1, (4, 8, 6), "nv").double()), unit(_randn(2, (4, 8, 6), "nv").double())
    angle = (low * high).sum(1).acos()
    # Gram-Schmidt: the direction in the plane of both that is orthogonal to `low`
    orthogonal = unit(high - (low * high).sum(1, keepdim=True) * low)
    rotation = (angle * strength).unsqueeze(1)
    torch.testing.assert_close(
        slerp(strength, low, high),
        rotation.cos() * low + rotation.sin() * orthogonal,
        rtol=0,
        atol=1e-9,
    )


def test_slerp_interpolates_parallel_noise_linearly():
    low = _randn(1, (4, 8, 6), "nv")
    high = low * 3
    torch.testing.assert_close(slerp(0.25, low, high), low * 1.5)


def test_initial_noise_uses_first_values_of_the_variation():
    shape = (4, 8, 6)
    mixed = initial_noise([ImageGenerator(3, "nv")], shape, [ImageGenerator(9, "nv")], 0.3)
    assert torch.equal(mixed[0], slerp(0.3, _randn(3, shape, "nv"), _randn(9, shape, "nv")))


def test_initial_noise_does_not_wait_for_the_device():
    """Check on the meta device, where reading a value raises. The copies have the seeds' keys."""
    first, second = ImageGenerator(3, "nv", "meta"), ImageGenerator(9, "nv", "meta")
    with Transfers() as transfers:
        initial_noise([first], (4, 8, 6), [second], 0.3)
    assert transfers.operations == ["to", "to"]


# --- Brownian tree


def test_brownian_nv_noise_equals_published_values():
    # Philox values do not depend on the shape, so four elements are enough
    noise = BrownianNoise([12345, 12346], (4,), KARRAS, "nv")
    steps = [noise(float(KARRAS[i]), float(KARRAS[i + 1])) for i in range(19)]
    np.testing.assert_allclose(steps[0][0], [2.147270, 0.832033, 0.143413, -0.518045], **TREE)
    np.testing.assert_allclose(steps[1][0], [1.003621, 0.283577, 2.696405, -0.341364], **TREE)
    # the last interval is 0.02 wide: the division by its root makes rounding errors 7 times larger
    np.testing.assert_allclose(
        steps[18][0], [-0.974563, 1.615373, -0.551859, -0.434521], rtol=0, atol=2e-4
    )
    np.testing.assert_allclose(steps[0][1, :2], [-0.590131, -1.679885], **TREE)


def test_brownian_cpu_noise_equals_published_values():
    noise = BrownianNoise([12345], LATENT, KARRAS, "cpu")
    first = noise(float(KARRAS[0]), float(KARRAS[1]))
    last = noise(float(KARRAS[18]), float(KARRAS[19]))
    np.testing.assert_allclose(_values(first), [-0.022775, -0.113971, -0.228898, 0.103657], **TREE)
    np.testing.assert_allclose(
        _values(last), [-0.523645, 0.101677, 0.570019, -0.948543], rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("seed", [0, 12345, 2**40 + 1])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_tree_equals_torchsde(scheduler: str, seed: int):
    shape = (4, 5)
    levels = [float(sigma) for sigma in sigmas_for(scheduler, 12, TABLE) if sigma > 0]
    low, high = min(levels), max(levels)
    reference = torchsde.BrownianTree(low, torch.zeros(shape), high, entropy=seed)
    tree = BrownianTree(low, high, shape, [seed], "cpu")
    for above, below in itertools.pairwise(levels):
        torch.testing.assert_close(
            tree.between(below, above), reference(below, above)[None], **TREE
        )


@pytest.mark.parametrize("scheduler", ["Karras", "Beta"])
def test_brownian_noise_of_dpmpp_sde_equals_torchsde(scheduler: str):
    shape, seeds = (4, 5), [3, 4]
    sigmas = sigmas_for(scheduler, 10, TABLE)
    intervals = brownian_intervals("DPM++ SDE", sigmas)
    assert len(intervals) == 2 * 9
    noise = BrownianNoise(seeds, shape, sigmas, "cpu")
    low, high = float(sigmas[-2]), float(sigmas[0])
    trees = [torchsde.BrownianTree(low, torch.zeros(shape), high, entropy=seed) for seed in seeds]
    for above, below in intervals:
        expected = torch.stack([-tree(below, above) for tree in trees]) / math.sqrt(above - below)
        # rounding grows with the division by the root of a narrow interval
        torch.testing.assert_close(
            noise(above, below), expected, rtol=0, atol=2e-5 / math.sqrt(above - below) + 2e-5
        )


@pytest.mark.parametrize("source", ["nv", "cpu"])
def test_brownian_noise_is_equal_alone_and_in_a_batch(source):
    sigmas = sigmas_for("Karras", 6, TABLE)
    batch = BrownianNoise([5, 6, 7], (4, 3), sigmas, source)
    single = [BrownianNoise([seed], (4, 3), sigmas, source) for seed in (5, 6, 7)]
    for above, below in brownian_intervals("DPM++ 2M SDE", sigmas):
        assert torch.equal(
            batch(above, below), torch.cat([noise(above, below) for noise in single])
        )


def test_tree_values_are_independent_of_the_query_order():
    times = [0.05, 3.0, 0.7, 14.0, 0.0501, 6.2]
    forward = BrownianTree(0.03, 14.6, (3,), [8], "nv")
    backward = BrownianTree(0.03, 14.6, (3,), [8], "nv")
    first = {time: forward.value(time) for time in times}
    for time in reversed(times):
        assert torch.equal(backward.value(time), first[time])


@pytest.mark.parametrize("sampler", ["DPM++ 2M SDE", "DPM++ SDE"])
def test_tree_keeps_few_nodes_and_repeats_values_bit_for_bit(
    sampler: str, monkeypatch: pytest.MonkeyPatch
):
    """Limit the memory of a tree.

    150 steps visit a few thousand nodes, 2 GiB at 1024x1024. A path has at most 25 levels (15
    halved to 1e-6) of two nodes each.
    """
    sigmas = sigmas_for("Karras", 150, TABLE)
    generated: list[int] = []

    def record(seeds, *rest):
        generated.extend(seeds)
        return randn(seeds, *rest)

    monkeypatch.setattr("alphalayer.engine.sampling.brownian_tree.randn", record)
    tree = BrownianTree(float(sigmas[-2]), float(sigmas[0]), (3,), [8], "nv")

    def count(node) -> int:
        return 0 if node is None else 1 + count(node.left) + count(node.right)

    intervals = brownian_intervals(sampler, sigmas)
    increments = [tree.between(below, above) for above, below in intervals]
    assert count(tree._root) <= 51
    # falling times generate nothing twice
    assert len(generated) == len(set(generated))
    for (above, below), increment in list(zip(intervals, increments, strict=True))[::7]:
        fresh = BrownianTree(float(sigmas[-2]), float(sigmas[0]), (3,), [8], "nv")
        assert torch.equal(increment, fresh.between(below, above))
        assert torch.equal(increment, tree.between(below, above))


def test_brownian_noise_copies_to_a_device_once_an_interval():
    """Check on the meta device, where reading a value raises. The copy has the seeds' keys."""
    noise = BrownianNoise([5, 6], (4, 8, 8), KARRAS, "nv", "meta")
    for above, below in brownian_intervals("DPM++ 2M SDE", KARRAS):
        with Transfers() as transfers:
            noise(above, below)
        assert transfers.operations in ([], ["to"])


def test_tree_starts_at_zero_and_clamps_times():
    tree = BrownianTree(1.0, 2.0, (3,), [8], "nv")
    assert torch.equal(tree.value(0.5), torch.zeros(1, 3))
    assert torch.equal(tree.value(9.0), tree.value(2.0))


def test_noise_generated_ahead_equals_noise_on_request():
    sigmas = sigmas_for("Karras", 8, TABLE)
    intervals = brownian_intervals("DPM++ SDE", sigmas)
    ahead = BrownianNoise([5, 6], (4, 3), sigmas, "nv", ahead=intervals)
    on_request = BrownianNoise([5, 6], (4, 3), sigmas, "nv")
    other = (float(sigmas[0]), float(sigmas[3]))
    with ahead:
        for interval in [*intervals[:3], other, *intervals[3:]]:
            assert torch.equal(ahead(*interval), on_request(*interval))


def test_noise_after_the_block_is_not_generated(monkeypatch: pytest.MonkeyPatch):
    """Check that a cancelled batch stops its thread and releases its noise."""
    requested: list[tuple[float, float]] = []
    between = BrownianTree.between
    monkeypatch.setattr(
        BrownianTree, "between", lambda tree, a, b: requested.append((b, a)) or between(tree, a, b)
    )
    sigmas = sigmas_for("Karras", 150, TABLE)
    intervals = brownian_intervals("DPM++ SDE", sigmas)
    with BrownianNoise([5], (4, 3), sigmas, "nv", ahead=intervals) as noise:
        noise(*intervals[0])
    assert requested == intervals[: len(requested)]
    assert 1 <= len(requested) <= 5
    assert not any(thread.name.startswith("brownian-noise") for thread in threading.enumerate())
    with pytest.raises(RuntimeError):
        noise(*intervals[-1])


def test_brownian_noise_has_unit_variance():
    noise = BrownianNoise([1], (20_000,), KARRAS, "nv")
    for i in (0, 9, 18):
        values = noise(float(KARRAS[i]), float(KARRAS[i + 1]))
        # four standard errors of the mean and of the deviation of 20,000 values
        assert abs(values.mean()) < 4 / math.sqrt(20_000)
        assert abs(values.std() - 1) < 4 / math.sqrt(40_000)


def test_one_step_requests_no_brownian_noise():
    sigmas = sigmas_for("Karras", 1, TABLE)
    assert brownian_intervals("DPM++ 2M SDE", sigmas) == []
    BrownianNoise([1], (4,), sigmas, "nv")


def test_tree_is_freed_without_the_garbage_collector():
    """Check for reference cycles: a tree holds about fifty latents, too many to keep."""
    tree = BrownianTree(0.1, 10.0, (4,), [5], "nv")
    tree.between(1.0, 2.0)
    reference = weakref.ref(tree)
    gc.disable()
    try:
        del tree
        assert reference() is None
    finally:
        gc.enable()
