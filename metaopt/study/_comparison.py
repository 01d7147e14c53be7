"""The result of a comparison, with its tables."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..plot import comparison
from ._statistics import adjusted, LEVEL, Mean, paired_p_value


@dataclasses.dataclass(frozen=True)
class Record:
    """One method on one seed, after training anew at each point.

    **Attributes:**

    - `costs`: the part of the budget that is spent at each point, `(num_points,)`.
    - `values`: each metric at each point, by its name.
    - `gradients`, `products`, `seconds`: the work in all; the seconds with compilation.
    - `found`: the values of the outer variables that the method returns, by their names,
        as lists of numbers; empty where they are more than 1000 numbers.
    - `num_failed`, `failure`: the steps or trials that failed, and how the first did.
    - `error`: the error that ended the method, in words; empty if none did.
    """

    costs: list[float]
    values: dict[str, list[float]]
    gradients: float
    products: float
    seconds: float
    found: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_failed: int = 0
    failure: str = ""
    error: str = ""

    def at(self, metric: str, cost: float) -> float:
        """The metric at the last point of no more than a cost."""
        if self.error:
            return math.nan
        reached = [i for i, c in enumerate(self.costs) if c <= cost * (1 + 1e-9)]
        return self.values[metric][reached[-1]] if reached else math.nan


class Comparison:
    """Whole methods side by side. `print` it.

    **Attributes:**

    - `records`: a [`metaopt.study.Record`][] by method and seed: `records["implicit"][0]`.
    - `metrics`: the names of the metrics, each with whether higher is better.
    - `budget`, `unit`: the amount that each method could spend on each seed.
    - `target`: the pair of a metric and the value whose cost is measured, or `None`.
    - `data`: the data that the metrics are of, in words.
    """

    def __init__(
        self,
        records: Mapping[str, Mapping[int, Record]],
        metrics: Mapping[str, bool],
        budget: float,
        unit: str,
        target: tuple[str, float] | None = None,
        data: str = "test",
    ):
        self.records = {name: dict(rows) for name, rows in records.items()}
        self.metrics = dict(metrics)
        self.budget = budget
        self.unit = unit
        self.target = target
        self.data = data

    @property
    def seeds(self) -> list[int]:
        """The seeds, in their order."""
        return list(next(iter(self.records.values())))

    def values(self, method: str, metric: str, cost: float | None = None) -> np.ndarray:
        """A metric of a method for each seed, after training anew.

        **Arguments:**

        - `method`, `metric`: their names.
        - `cost`: at this part of the budget; by default at its end.

        **Returns:**

        An array of shape `(num_seeds,)`; NaN where the method failed.
        """
        cost = self.budget if cost is None else cost
        return np.array([r.at(metric, cost) for r in self.records[method].values()])

    def mean(self, method: str, metric: str, cost: float | None = None) -> Mean:
        """The mean over seeds of `values`, a [`metaopt.study.Mean`][]."""
        return Mean.of(self.values(method, metric, cost))

    def order(self, metric: str, cost: float | None = None) -> list[str]:
        """The methods, the best first.

        A method that lacks a value for some seeds comes after those that lack fewer: its
        mean leaves out the seeds on which it failed.
        """
        return sorted(self.records, key=lambda one: self._place(one, metric, cost))

    def _place(
        self, method: str, metric: str, cost: float | None = None
    ) -> tuple[int, float]:
        """The number of values that are missing and the mean: the lower, the better."""
        mean = self.mean(method, metric, cost)
        sign = -1.0 if self.metrics[metric] else 1.0
        missing = len(self.seeds) - mean.num_values
        return missing, sign * mean.mean if mean.num_values else math.inf

    def p_values(self, metric: str) -> dict[str, float]:
        """The p-value of the difference of each other method to the best one.

        Of paired t-tests over seeds, raised for their number by the method of Holm; NaN
        where fewer than two seeds have both, and where all of them differ by the same.
        """
        best, *others = self.order(metric)
        mine = self.values(best, metric)
        raw = [paired_p_value(mine, self.values(other, metric)) for other in others]
        return dict(zip(others, adjusted(raw)))

    def cost_to_target(self, method: str) -> np.ndarray:
        """The amount that each seed spends until the target; infinite if it is missed."""
        if self.target is None:
            raise ValueError("The study has no target. Give `compare(..., target=...)`.")
        metric, value = self.target
        higher = self.metrics[metric]
        costs = []
        for record in self.records[method].values():
            pairs = () if record.error else zip(record.costs, record.values[metric])
            good = [c for c, x in pairs if (x >= value if higher else x <= value)]
            costs.append(min(good, default=math.inf))
        return np.array(costs)

    def verdict(self, metric: str) -> str:
        """A sentence on the best method by a metric, and on what is beyond chance."""
        best, *others = self.order(metric)
        mean = self.mean(best, metric)
        what = f"{metric} ({self.data}, {'higher' if self.metrics[metric] else 'lower'}"
        count = f" on {mean.num_values} of {len(self.seeds)} seeds"
        shown = f"{mean}{count if self._lacks(mean) else ''}"
        text = f"By {what} is better), {best} is best: {shown}."
        if math.isnan(mean.mean):
            return f"By {what} is better), no method has a value."
        if not others:
            return text
        if mean.num_values < 2:
            return text + " One seed says nothing about chance."
        groups: dict[str, list[str]] = {}
        for other, p in self.p_values(metric).items():
            kind = self._kind(metric, best, other, p)
            shown = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
            groups.setdefault(kind, []).append(
                other if kind == "unknown" else f"{other} ({shown})"
            )
        if "beyond" in groups:
            text += f" Beyond chance it is better than {', '.join(groups['beyond'])}."
        if "within" in groups:
            text += f" It is within chance of {', '.join(groups['within'])}."
        if "behind" in groups:
            text += (
                " On the seeds that both have a value for, it is behind "
                f"{', '.join(groups['behind'])}."
            )
        if "unknown" in groups:
            text += (
                f" Not tested against {', '.join(groups['unknown'])}: fewer than two seeds "
                "have both, or all of them differ by the same."
            )
        return text

    def _kind(self, metric: str, best: str, other: str, p: float) -> str:
        """The kind of the difference of another method to the best one."""
        if math.isnan(p):
            return "unknown"
        if p >= LEVEL:
            return "within"
        differences = self.values(best, metric) - self.values(other, metric)
        better = (np.nanmean(differences) > 0) == self.metrics[metric]
        return "beyond" if better else "behind"

    def _lacks(self, mean: Mean) -> bool:
        """Whether some seeds, but not all, have no value."""
        return 0 < mean.num_values < len(self.seeds)

    def changes(self) -> list[str]:
        """Sentences on orders of the best that depend on the budget or on the metric."""
        sentences = []
        for metric in self.metrics:
            end = self.order(metric)[0]
            for part, share in (("a quarter", 0.25), ("half", 0.5)):
                cost = share * self.budget
                early = self.order(metric, cost)[0]
                # Strictly, because methods begin at the same settings.
                if self._place(early, metric, cost) < self._place(end, metric, cost):
                    sentences.append(
                        f"By {metric}, {early} is best at {part} of the budget, and {end} "
                        "at its end."
                    )
        winners = {metric: self._winners(metric) for metric in self.metrics}
        winners = {metric: best for metric, best in winners.items() if best}
        if winners and not set.intersection(*map(set, winners.values())):
            each = ", ".join(f"{best[0]} by {metric}" for metric, best in winners.items())
            sentences.append(f"The best method depends on the metric: {each}.")
        return sentences

    def _winners(self, metric: str) -> list[str]:
        """The best methods by a metric, several at a tie; none if it has no value."""
        order = self.order(metric)
        first = self._place(order[0], metric)
        if math.isinf(first[1]):
            return []
        return [method for method in order if self._place(method, metric) == first]

    def figure(self) -> Any:
        """Draw each metric over the part of the budget that is spent.

        **Returns:**

        A figure of matplotlib, with one panel for each metric: means over seeds, and bands
        of one standard error.
        """
        return comparison(self)

    def plot(self, path: str | Path) -> None:
        """Write the figure to a file.

        **Arguments:**

        - `path`: the file, such as `"curves.png"`.
        """
        self.figure().savefig(path, dpi=130)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        count = len(self.seeds)
        title = (
            f"Comparison over {count} seed{'s' if count > 1 else ''}, {self.budget:,g} "
            f"{self.unit} each; after training anew"
        )
        header = ["method", *self.metrics]
        header += ["spent", "gradients", "products", "seconds"]
        if self.target is not None:
            metric, value = self.target
            sign = ">=" if self.metrics[metric] else "<="
            header.append(f"{self.unit} to {metric} {sign} {value:g}")
        lines = [header, *(self._row(method) for method in self.order(header[1]))]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [title]
        for line in lines:
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(w) for cell, w in zip(line[1:], widths[1:])]
            text.append("  " + "  ".join(cells))
        text += [self.verdict(metric) for metric in self.metrics]
        if count > 1 and len(self.records) > 1:
            text.append("(p is of paired t-tests over seeds, raised by Holm.)")
        return "\n".join([*text, *self.changes(), *self._notes()])

    def _row(self, method: str) -> list[str]:
        row = [method]
        for metric in self.metrics:
            mean = self.mean(method, metric)
            count = (
                f" ({mean.num_values} of {len(self.seeds)})" if self._lacks(mean) else ""
            )
            row.append(f"{mean}{count}")
        records = self.records[method].values()
        spent = Mean.of(np.array([record.costs[-1] for record in records])).mean
        row.append(f"{spent:,.4g}" if spent < 10 else f"{spent:,.0f}")
        for name in ("gradients", "products", "seconds"):
            amounts = np.array([vars(record)[name] for record in records])
            mean = Mean.of(amounts).mean
            digits = 1 if name == "seconds" else 0
            row.append("-" if math.isnan(mean) else f"{mean:,.{digits}f}")
        if self.target is not None:
            costs = self.cost_to_target(method)
            reached = costs[np.isfinite(costs)]
            cell = f"{np.mean(reached):,.0f}" if reached.size else "never"
            if 0 < reached.size < costs.size:
                cell += f" ({reached.size} of {costs.size})"
            row.append(cell)
        return row

    def _notes(self) -> list[str]:
        notes = []
        if self._seeds_are_alike():
            notes.append(
                "All seeds gave the same numbers, and count as one: data, initialisation "
                "and minibatches do not depend on the seed. Give `split=`, an `init_fn` in "
                "place of `params=`, or `metaopt.Minibatches`."
            )
        for method, rows in self.records.items():
            for seed, record in rows.items():
                if record.error:
                    notes.append(f"{method}, seed {seed}, ended with: {record.error}")
            failed = [record for record in rows.values() if record.num_failed]
            if failed:
                total = sum(record.num_failed for record in failed)
                cause = failed[0].failure.split(". ")[0].rstrip(".")
                notes.append(f"{method}: {total} steps or trials failed. {cause}.")
        return notes

    def _seeds_are_alike(self) -> bool:
        rows = [list(rows.values()) for rows in self.records.values()]
        alike = lambda a, b: a.costs == b.costs and a.values == b.values
        return len(self.seeds) > 1 and all(
            alike(row[0], other) for row in rows for other in row[1:]
        )
