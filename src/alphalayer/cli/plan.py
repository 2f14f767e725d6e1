"""The command `plan`: its options, and how what the simulation says is shown."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from alphalayer.cli.console import err, out
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.optional_dependencies import require
from alphalayer.planner.simulation import (
    GPUS,
    OLD_STACK,
    Load,
    Offer,
    Scaling,
    fixed_offer,
    old_offers,
    scaled_offer,
)

_COLUMNS = ("card", "one", "pods", "mean\nwait", "95 %\nwait", "busy", "$ an\nhour", "$ per\n1000")
_MEANING = """
one         seconds for a picture drawn alone
pods        machines with such a card; where they come and go, the mean and (the most)
wait        seconds from asking to the picture: the mean, and what 95 of 100 stay below
busy        part of their time that pods draw
$ an hour   dollars for all pods; $ per 1000: dollars for a thousand pictures
"""


def plan(
    users: Annotated[int, typer.Option(min=1, help="People who use the service at the same time.")],
    think_time: Annotated[
        float, typer.Option(min=0, help="Seconds a user looks at a picture before the next one.")
    ] = 30.0,
    gpu: Annotated[str, typer.Option(help=f"{', '.join(GPUS)}, or all.")] = "all",
    p95: Annotated[
        float,
        typer.Option(
            min=0.1, help="Seconds in which 95 of 100 requests are to have their picture."
        ),
    ] = 20.0,
    batch: Annotated[int, typer.Option(min=1, help="Jobs drawn together at most.")] = 4,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.01, help="Seconds of one picture alone, where you measured it."),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars an hour of one pod.")] = None,
    autoscale: Annotated[
        bool, typer.Option(help="Also with pods that come and go by the queue's age.")
    ] = False,
    cold_start: Annotated[
        float, typer.Option(min=0, help="Seconds until a pod that is started can draw.")
    ] = 90.0,
    scale_age: Annotated[
        float, typer.Option(min=0.1, help="Age of the oldest job at which pods are started.")
    ] = 10.0,
    max_pods: Annotated[
        int, typer.Option(min=1, help="Pods at most, where they come and go.")
    ] = 100,
) -> None:
    """Say how many pods that many users need, how long they wait, and what it costs; by simulation."""
    require("simpy", "planner")
    chosen = GPUS if gpu == "all" else {gpu: GPUS[gpu]} if gpu in GPUS else None
    if chosen is None:
        raise InvalidRequest(
            f'unknown card "{gpu}".', hint=f"Use one of: {', '.join(GPUS)}, or all.", field="gpu"
        )
    load, offers = Load(users, think_time), list[Offer]()
    for name, card in chosen.items():
        alone, cost = seconds or card.seconds, card.price if price is None else price
        try:
            offers.append(fixed_offer(name, load, alone, batch, p95, cost))
        except ValueError as error:
            err.print(f"{name}: {error}.")
            continue
        if autoscale:
            scaling = Scaling(max_pods, cold_start, scale_age)
            offers.append(scaled_offer(f"{name}, autoscaled", load, alone, batch, cost, scaling))
    if not offers:
        raise typer.Exit(1)
    _show_offers(offers + old_offers(load, p95))
    if not seconds:
        out.print("\n".join(f"{name}: {card.source}" for name, card in chosen.items()))
    out.print(OLD_STACK)


def _show_offers(offers: list[Offer]) -> None:
    table = Table(*_COLUMNS, box=None, padding=(0, 2, 0, 0))  # 80 columns are enough
    for each in offers:
        waits = [
            f"{each.outcome.mean_s:.1f} s",
            f"{each.outcome.p95_s:.1f} s",
            f"{each.outcome.use:.0%}",
        ]
        costs = ["-" if cost is None else f"{cost:.2f}" for cost in (each.hourly, each.a_thousand)]
        table.add_row(each.name, f"{each.seconds:g} s", each.pods, *waits, *costs)
    out.print(table)
    out.print(_MEANING)
