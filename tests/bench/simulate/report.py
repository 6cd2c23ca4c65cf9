"""Runs workloads under policies, and says what came of it: one JSON line each on standard output, plots on request."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, NamedTuple

import click
import numpy as np
from rich.console import Console
from rich.progress import track

from tests.bench.simulate import bound
from tests.bench.simulate.policies import POLICIES, Ours
from tests.bench.simulate.run import Clients, Result, Run
from tests.bench.simulate.scene import Scene, load

WORKLOADS = Path(__file__).parent / "workloads"


def _workload(context: click.Context, parameter: click.Parameter, names: Sequence[str]) -> list[Path]:
    """The files of the workloads, each read once, so that what is wrong is said before anything runs."""
    known = sorted(WORKLOADS.glob("*.toml"))
    paths = [Path(name) if name.endswith(".toml") else WORKLOADS / f"{name}.toml" for name in names] or known
    for path, name in zip(paths, names, strict=False):
        try:
            load(path, 0)
        except FileNotFoundError:
            raise click.BadParameter(f"no workload {name}; there are {', '.join(one.stem for one in known)}, or a TOML file") from None
        except KeyError as error:
            raise click.BadParameter(f"{name} lacks {error}") from None
        except (OSError, TypeError, ValueError) as error:
            raise click.BadParameter(f"{name} is no workload: {error}") from None
    return paths


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--workload", "paths", multiple=True, callback=_workload, metavar="NAME|FILE.toml",
    help="A workload by name, or a TOML file of yours. All by default.",
)  # fmt: skip
@click.option("--policy", "policies", multiple=True, type=click.Choice(list(POLICIES)), help="All by default.")
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="How often each is run; figures are means.")
@click.option("--brokers", type=click.IntRange(1), help="As many brokers, instead of what the workload says.")
@click.option(
    "--clients",
    "kinds",
    multiple=True,
    type=click.Choice([kind.value for kind in Clients]),
    help="What every policy's clients do: one source until it fails, or help from several as `broker get` does. Both by default.",
)
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Directory for a PNG of each workload.")
def main(paths: Sequence[Path], policies: Sequence[str], seeds: int, brokers: int | None, kinds: Sequence[str], plots: Path | None) -> None:
    """Time to last byte under several policies, beside the least that any could reach (ratio = makespan / bound).

    For example: python -m tests.bench simulate --workload slow_storm --plots /tmp/plots
    """
    clients = [Clients(kind) for kind in kinds] or list(Clients)
    policies = policies or list(POLICIES)
    jobs = [Job(path, seed, policy, kind, brokers) for path in paths for kind in clients for policy in policies for seed in range(seeds)]
    drawn = [(path, seed) for path in paths for seed in range(seeds)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        bounds = dict(zip(drawn, pool.map(_bound, drawn), strict=True))
        found: dict[tuple[Path, Clients], dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
        shown = track(pool.map(_run, jobs), "simulating", total=len(jobs), console=Console(stderr=True), transient=True)
        for job, result in zip(jobs, shown, strict=True):
            found[job.path, job.clients][job.policy].append(result)
    for (path, kind), by_policy in found.items():
        figures = {policy: _figures(results, [bounds[path, seed] for seed in range(seeds)]) for policy, results in by_policy.items()}
        for policy, line in figures.items():
            print(json.dumps({"bench": "simulate", "case": f"{path.stem}/{kind}/{policy}", **line}))
        if others := {policy: line["p99_s"] for policy, line in figures.items() if policy != Ours.name and Ours.name in figures}:
            best = min(others, key=others.__getitem__)
            versus = {
                "bench": "simulate", "case": f"{path.stem}/{kind}", "value": figures[Ours.name]["p99_s"], "unit": "s",
                "ratio": round(figures[Ours.name]["p99_s"] / others[best], 3), "comparator": f"p99 of {best}, the best of the others",
                "comparator_value": others[best],
            }  # fmt: skip
            print(json.dumps(versus), flush=True)
        if plots is not None:
            plots.mkdir(parents=True, exist_ok=True)
            _plot({policy: results[0] for policy, results in by_policy.items()}, bounds[path, 0], plots / f"{path.stem}-{kind}.png")


class Job(NamedTuple):
    """One run."""

    path: Path
    seed: int
    policy: str
    clients: Clients
    brokers: int | None


def scene(path: Path, seed: int, brokers: int | None = None) -> Scene:
    """One workload as drawn by `seed`."""
    loaded = load(path, seed)
    return loaded if brokers is None else replace(loaded, brokers=brokers)


def _run(job: Job) -> Result:
    drawn = scene(job.path, job.seed, job.brokers)
    return Run(drawn, POLICIES[job.policy](drawn, Random(job.seed)), job.seed, job.clients).result()


def _bound(job: tuple[Path, int]) -> float:
    return bound.makespan(load(*job))


def _figures(results: Sequence[Result], bounds: Sequence[float]) -> dict[str, Any]:
    makespans = [max(result.ends) for result in results]
    return {
        "value": round(fmean(makespans), 2),
        "unit": "s",
        "ratio": round(fmean(m / b for m, b in zip(makespans, bounds, strict=True)), 3),
        "comparator": "fluid lower bound",
        "comparator_value": round(fmean(bounds), 2),
        "p50_s": round(fmean(float(np.percentile(result.seconds, 50)) for result in results), 2),
        "p99_s": round(fmean(float(np.percentile(result.seconds, 99)) for result in results), 2),
        "jain": round(fmean(jain(by_project(result)) for result in results), 4),
        "utilisation": round(fmean(_utilisation(result) for result in results), 3),
        "crossing_gb": round(fmean(result.crossing for result in results) / 1e9, 1),
        "over_slots": max(result.over_slots for result in results),
    }


def by_project(result: Result) -> list[float]:
    """Downloads that each project ended while every project still had some under way, or waiting."""
    ended: dict[str, list[float]] = defaultdict(list)
    for want, end in result.ended:
        ended[result.scene.nodes[want.node].project].append(end)
    together = min(max(ends) for ends in ended.values())
    return [float(sum(end <= together for end in ends)) for ends in ended.values()]


def jain(shares: Iterable[float]) -> float:
    """Jain's index of fairness: 1 when all are equal, 1/n when one has everything (Jain, Chiu and Hawe, 1984)."""
    values = list(shares)
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def _utilisation(result: Result) -> float:
    """Of what the stores could have served until the last byte."""
    return sum(result.served.values()) / (sum(store.rate for store in result.scene.stores) * max(result.ends))


def _plot(results: Mapping[str, Result], least: float, path: Path) -> None:
    """Who is done when, and what each store serves under our policy."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5))
    for policy, result in results.items():
        seconds = np.sort(result.seconds)
        left.plot(seconds, np.arange(1, len(seconds) + 1) / len(seconds), label=policy, linewidth=2.5 if policy == "ours" else 1.2)
    left.axvline(least, color="black", linestyle=":", label="lower bound of the makespan")
    left.set(title=f"{path.stem}: time to last byte", xlabel="seconds", ylabel="share of downloads", xscale="log")
    left.legend(fontsize="small")
    shown = results.get("ours") or next(iter(results.values()))
    instants = [instant for instant, _ in shown.timeline]
    right.stackplot(
        instants, *([rates[store.name] / 1e9 for _, rates in shown.timeline] for store in shown.scene.stores),
        labels=[store.name for store in shown.scene.stores], alpha=0.8,
    )  # fmt: skip
    right.set(title=f"what the stores serve ({shown.policy})", xlabel="seconds", ylabel="GB/s")
    right.legend(fontsize="small")
    figure.text(0.5, 0.005, shown.scene.about, ha="center", fontsize="small")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
