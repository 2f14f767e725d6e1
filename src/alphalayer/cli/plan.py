"""The command `plan`: its options, and the table of its estimates."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from alphalayer.cli.console import err, out
from alphalayer.cli.options import name_flags
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.optional_dependencies import require
from alphalayer.planner.simulation import (
    FORGE_NOTE,
    GPUS,
    Estimate,
    Load,
    Scaling,
    estimate_autoscaled,
    estimate_fixed,
    estimate_forge,
)

app = typer.Typer()

_COLUMNS = ("GPU", "one", "pods", "mean\nwait", "95 %\nwait", "busy", "$ an\nhour", "$ per\n1000")
_LEGEND = """
one         seconds for one image alone
pods        machines with such a GPU; with autoscaling, the mean and (the maximum)
wait        seconds from request to image: mean and 95th percentile
busy        part of the time in which the pods generate images
$ an hour   dollars for all pods; $ per 1000: dollars for a thousand images
"""


@app.command()
@name_flags
def plan(
    users: Annotated[int, typer.Option(min=1, help="Users at the same time.")],
    think_time: Annotated[
        float, typer.Option(min=0, help="Mean seconds between an image and the next request.")
    ] = 30.0,
    gpu: Annotated[str, typer.Option(help=f"{', '.join(GPUS)}, or all.")] = "all",
    p95: Annotated[
        float,
        typer.Option(min=0.1, help="Target in seconds: 95 of 100 requests get their image in it."),
    ] = 20.0,
    batch: Annotated[int, typer.Option(min=1, help="Most jobs of a batch.")] = 4,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.01, help="Your measured seconds for one image alone."),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars an hour of one pod.")] = None,
    autoscale: Annotated[
        bool, typer.Option(help="Also estimate an autoscaled fleet, by the age of the queue.")
    ] = False,
    cold_start: Annotated[
        float, typer.Option(min=0, help="Seconds until a new pod can generate images.")
    ] = 90.0,
    scale_age: Annotated[
        float, typer.Option(min=0.1, help="Age of the oldest job at which pods are added.")
    ] = 10.0,
    max_pods: Annotated[int, typer.Option(min=1, help="Most pods of an autoscaled fleet.")] = 100,
) -> None:
    """Estimate pods, waiting time and cost for a number of users, by simulation."""
    require("simpy", "planner")
    gpus = GPUS if gpu == "all" else {gpu: GPUS[gpu]} if gpu in GPUS else None
    if gpus is None:
        raise InvalidRequest(
            f'unknown GPU "{gpu}".', hint=f"Use one of: {', '.join(GPUS)}, or all.", field="gpu"
        )
    load, estimates = Load(users, think_time), list[Estimate]()
    for name, spec in gpus.items():
        image_s, cost = seconds or spec.seconds, spec.price if price is None else price
        try:
            estimates.append(estimate_fixed(name, load, image_s, batch, p95, cost))
        except ValueError as error:
            err.print(f"{name}: {error}.")
            continue
        if autoscale:
            scaling = Scaling(max_pods, cold_start, scale_age)
            label = f"{name}, autoscaled"
            estimates.append(estimate_autoscaled(label, load, image_s, batch, cost, scaling))
    if not estimates:
        raise typer.Exit(1)
    _show_estimates(estimates + estimate_forge(load, p95))
    if not seconds:
        out.print("\n".join(f"{name}: {spec.source}" for name, spec in gpus.items()))
    out.print(FORGE_NOTE)


def _show_estimates(estimates: list[Estimate]) -> None:
    table = Table(*_COLUMNS, box=None, padding=(0, 2, 0, 0))  # 80 columns are enough
    for estimate in estimates:
        outcome = estimate.outcome
        waits = [f"{outcome.mean_s:.1f} s", f"{outcome.p95_s:.1f} s", f"{outcome.use:.0%}"]
        costs = [
            "-" if cost is None else f"{cost:.2f}"
            for cost in (estimate.hourly_cost, estimate.cost_per_thousand)
        ]
        table.add_row(estimate.name, f"{estimate.seconds:g} s", estimate.pods, *waits, *costs)
    out.print(table)
    out.print(_LEGEND)
