"""How many workers Kubernetes and KEDA make of the queue's age, by simulation: `python -m benchmarks.autoscaling`.

Users who look at each picture for five minutes, so that requests come nearly at random, as many as keep 5, 10 or 18 workers busy at 95 %;
a picture takes 2.8 seconds, a worker is cold for 90, and 20 of them are the most. Three ways to scale: as deploy/kubernetes/worker.yaml
does it, the same without its limits on how fast workers come, and with KEDA's default metric type. Writes
benchmarks/results/autoscaling-<date>.json.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from benchmarks.report import write_report

from alphalayer.planner.simulation import Fleet, Load, Scaling, simulate

THINK_S, PICTURE_S, USE, MOST = 300.0, 2.8, 0.95, 20


@dataclass(frozen=True)
class AverageValue(Scaling):
    """KEDA's default: the age divided by the target is the number of workers."""

    def wanted(self, pods: int, age_s: float) -> int:  # noqa: ARG002 - the number there is does not count
        """Whatever there is, so many."""
        return math.ceil(age_s / self.age_s)


WAYS = {
    "Value, as in deploy/kubernetes": Scaling(MOST),
    "Value, as fast as wanted": Scaling(MOST, up_a_minute=1000),
    "AverageValue": AverageValue(MOST, up_a_minute=1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--needed", type=int, nargs="+", default=[5, 10, 18], help="workers that the load needs"
    )
    parser.add_argument("--hours", type=float, default=5.0)
    options = parser.parse_args()
    report: dict[str, Any] = {**vars(options), "ways": {}}
    for name, scaling in WAYS.items():
        report["ways"][name] = {}
        for needed in options.needed:
            load = Load(round(needed * USE / PICTURE_S * THINK_S), THINK_S)
            found = simulate(load, Fleet(1, PICTURE_S, 1, scaling), options.hours * 3600)
            figures = {
                "mean_wait_s": found.mean_s,
                "p95_wait_s": found.p95_s,
                "mean_pods": found.mean_pods,
            }
            report["ways"][name][needed] = {
                "users": load.users,
                **{key: round(value, 1) for key, value in figures.items()},
                "most_pods": found.most_pods,
            }
            print(name, needed, report["ways"][name][needed], flush=True)
    write_report("autoscaling", report)


if __name__ == "__main__":
    main()
