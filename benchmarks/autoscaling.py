"""Simulation of three autoscaling rules of Kubernetes and KEDA by the age of the queue.

    python -m benchmarks.autoscaling

Users think for five minutes between images, so requests come nearly at random.
Their number keeps 5, 10 or 18 workers busy at 95 %.
An image takes 2.8 seconds, a cold start 90 seconds, and there are at most 20 workers.

The rules are:

- that of deploy/kubernetes/worker.yaml
- the same without its limit on the scale-up rate
- KEDA's default metric type

Writes benchmarks/results/autoscaling-<date>.json.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from benchmarks.report import write_report

from alphalayer.planner.simulation import Fleet, Load, Scaling, simulate

THINK_S, IMAGE_S, UTILIZATION, MAX_PODS = 300.0, 2.8, 0.95, 20


@dataclass(frozen=True)
class AverageValue(Scaling):
    """KEDA's default metric type: the number of workers is the age divided by the target."""

    def desired_pods(self, pods: int, age_s: float) -> int:  # noqa: ARG002 - the rule ignores it
        """Return the desired pods, independent of the current number."""
        return math.ceil(age_s / self.age_s)


RULES = {
    "Value, as in deploy/kubernetes": Scaling(MAX_PODS),
    "Value, as fast as wanted": Scaling(MAX_PODS, up_a_minute=1000),
    "AverageValue": AverageValue(MAX_PODS, up_a_minute=1000),
}


def main() -> None:
    """Simulate and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--needed", type=int, nargs="+", default=[5, 10, 18], help="workers that the load needs"
    )
    parser.add_argument("--hours", type=float, default=5.0)
    options = parser.parse_args()
    report: dict[str, Any] = {**vars(options), "ways": {}}
    for name, scaling in RULES.items():
        report["ways"][name] = {}
        for needed in options.needed:
            load = Load(round(needed * UTILIZATION / IMAGE_S * THINK_S), THINK_S)
            outcome = simulate(load, Fleet(1, IMAGE_S, 1, scaling), options.hours * 3600)
            figures = {
                "mean_wait_s": outcome.mean_s,
                "p95_wait_s": outcome.p95_s,
                "mean_pods": outcome.mean_pods,
            }
            report["ways"][name][needed] = {
                "users": load.users,
                **{key: round(value, 1) for key, value in figures.items()},
                "most_pods": outcome.most_pods,
            }
            print(name, needed, report["ways"][name][needed], flush=True)
    write_report("autoscaling", report)


if __name__ == "__main__":
    main()
