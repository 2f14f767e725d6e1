"""The simulation against queueing theory, and the output of the command."""

from __future__ import annotations

import itertools
import re

import pytest
from typer.testing import CliRunner

from alphalayer.cli import console
from alphalayer.cli.app import app
from alphalayer.planner.simulation import (
    SYNC_S,
    Autoscaler,
    Fleet,
    Load,
    Scaling,
    find_min_pods,
    simulate,
)


def test_simulate_one_user_never_waits():
    outcome = simulate(Load(1, 10.0), Fleet(1, 2.0, batch=1), duration_s=5000)
    assert outcome.mean_s == pytest.approx(2.0)
    assert outcome.use == pytest.approx(2.0 / 12.0, rel=0.15)


def test_simulate_saturated_fleet_follows_the_operational_law():
    """Compare the cycle of a saturated closed system with users x seconds / pods."""
    outcome = simulate(Load(50, 10.0), Fleet(2, 3.0, batch=1), duration_s=4000)
    assert outcome.mean_s == pytest.approx(50 * 3.0 / 2 - 10.0, rel=0.05)
    assert outcome.use > 0.99


def test_simulate_batches_gain_the_modelled_throughput():
    alone = simulate(Load(50, 1.0), Fleet(2, 3.0, batch=1), duration_s=3000)
    together = simulate(Load(50, 1.0), Fleet(2, 3.0, batch=4), duration_s=3000)
    assert len(together.waits) / len(alone.waits) == pytest.approx(4 / 3.7, rel=0.03)


def test_simulate_fleet_grows_if_jobs_wait_too_long():
    load = Load(60, 10.0)
    fixed = simulate(load, Fleet(1, 2.0), duration_s=6000)
    growing = simulate(load, Fleet(1, 2.0, scaling=Scaling(20, cold_start_s=60)), duration_s=6000)
    assert growing.mean_s < fixed.mean_s / 4
    assert growing.most_pods > growing.mean_pods > 1
    assert fixed.mean_pods == pytest.approx(1)


def test_autoscaler_without_waiting_jobs_removes_pods():
    """Remove one of ten pods every five minutes, once no job waited for that long."""
    env, scaler = 0.0, Autoscaler(Scaling(20, down_every_s=300.0), 1)
    pods, removed = 10, list[float]()
    for step in range(240):
        age = 60.0 if step == 0 else 0.0
        after = scaler.update(env, pods, age)
        removed += [env] * (after < pods)
        pods, env = after, env + SYNC_S
    assert removed[0] == pytest.approx(315, abs=SYNC_S)
    assert {later - sooner for sooner, later in itertools.pairwise(removed)} == {300.0}


def test_autoscaler_adds_pods_by_queue_age_within_its_rate():
    scaler = Autoscaler(Scaling(20, age_s=20.0, up_a_minute=2), 1)
    assert scaler.update(0, 10, 21.0) == 10
    assert [
        scaler.update(now, pods, 25.0) for now, pods in ((15, 10), (30, 12), (75, 12), (90, 14))
    ] == [12, 12, 14, 14]
    assert Autoscaler(Scaling(11), 1).update(0, 10, 1000.0) == 11


def test_simulate_cold_pod_serves_no_job():
    scaling = Scaling(20, cold_start_s=10_000.0)
    late = simulate(Load(60, 10.0), Fleet(1, 2.0, scaling=scaling), duration_s=6000)
    fixed = simulate(Load(60, 10.0), Fleet(1, 2.0), duration_s=6000)
    assert late.mean_s == pytest.approx(fixed.mean_s)
    assert late.mean_pods > 5


def test_find_min_pods_returns_the_smallest_fleet():
    load = Load(100, 30.0)
    pods, outcome = find_min_pods(load, 3.0, 4, 15.0)
    assert outcome.p95_s <= 15.0
    assert outcome.use <= 0.9
    fewer = simulate(load, Fleet(pods - 1, 3.0, 4))
    assert fewer.p95_s > 15.0 or fewer.use > 0.9
    with pytest.raises(ValueError, match=r"alone takes 20\.0 s"):
        find_min_pods(load, 20.0, 4, 15.0)


def test_plan_command_prints_one_row_for_each_fleet(monkeypatch):
    monkeypatch.setattr(
        console.out, "_width", 80
    )  # else as wide as COLUMNS was when this was imported first

    def run_plan(*options: str) -> str:
        result = CliRunner().invoke(app, ["plan", "--users", "20", "--gpu", "h200", *options])
        assert result.exit_code == 0
        return result.output

    plain = run_plan("--price", "4")
    assert "h200" in plain
    assert "Forge, 15 s" in plain
    assert "autoscaled" not in plain
    scaled = run_plan("--autoscale", "--cold-start", "30", "--scale-age", "5", "--max-pods", "3")
    (row,) = [line for line in scaled.splitlines() if line.startswith("h200, autoscaled")]
    assert re.search(r" \d\.\d \(\d\) .* \d+\.\d\d  \d+\.\d\d\s*$", row)
    wrong = CliRunner().invoke(app, ["plan", "--users", "20", "--gpu", "abacus"])
    assert 'unknown GPU "abacus"' in str(wrong.exception)


@pytest.mark.parametrize(
    "wrong",
    [("--seconds", "0"), ("--seconds", "-1"), ("--price", "-1"), ("--users", "-5"), ("--p95", "0")],
)
def test_plan_command_impossible_number_is_refused(wrong: tuple[str, str]):
    result = CliRunner().invoke(app, ["plan", "--users", "5", *wrong])
    assert result.exit_code == 2
    assert wrong[0] in result.output


def test_plan_command_without_a_fast_enough_gpu_fails():
    result = CliRunner().invoke(app, ["plan", "--users", "5", "--gpu", "h200", "--p95", "0.5"])
    assert result.exit_code == 1
    assert "one image alone takes 0.9 s" in result.output
