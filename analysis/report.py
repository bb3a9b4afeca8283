"""The report of compare.py: tables in Markdown, and files with all numbers."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from analysis import plots
from analysis.runs import (
    Group,
    StoredRun,
    confounders,
    group_runs,
    repeated_runs,
    step_flops,
    tokens_per_step,
)
from analysis.statistics import (
    CONFIDENCE,
    MARGIN,
    Difference,
    PairedTest,
    compare_losses,
    data_efficiency,
    describe,
    fit_power_law,
    holm,
    overhead,
    step_times,
)
from runtime.cli import UserError
from runtime.files import write_text

Row = dict[str, str]  # column → text


class Key(NamedTuple):
    """What a group must have in common with its reference."""

    task: str  # model, data and batch
    tokens: int


@dataclass(frozen=True)
class Section:
    """A table of the report."""

    title: str
    rows: list[Row]
    explanation: str = ""


@dataclass(frozen=True)
class Report:
    """What compare.py prints, and writes as Markdown and HTML."""

    verdicts: list[str]
    notes: list[str]
    sections: list[Section]

    def as_markdown(self) -> str:
        """Return the whole report as text."""
        parts = ["\n".join([*self.notes, *self.verdicts])]
        for section in self.sections:
            parts += [section.title, format_table(section.rows)]
            if section.explanation:
                parts.append(section.explanation)
        return "\n\n".join(parts)


def make_report(
    runs: list[StoredRun],
    reference: str | None = None,
    target: float | None = None,
    margin: float = MARGIN,
) -> Report:
    """Return the report on runs.

    Args:
        runs: what to compare.
        reference: the run to compare with. Default: the first one with AdamW.
        target: the loss to reach. Default: the reference's at its longest horizon.
        margin: nats per token; smaller differences count as none.
    """
    groups = group_runs(runs)
    if not groups:
        return Report(["no run is finished: nothing to compare yet"], notes(runs), [])

    base = references(groups, reference)
    comparisons = compare_groups(groups, base, margin)
    sections = [
        Section(
            "Final losses",
            [loss_row(comparison) for comparison in comparisons],
            explain_losses(comparisons, margin),
        ),
        Section("Cost", [cost_row(group) for group in groups]),
        Section("To the target", target_rows(groups, base, target), "Means, without a test."),
        Section(
            "The paper's test: T steps against T and 2T, each with its own decayed schedule",
            doubled_rows(groups, base, margin),
            f"As good: a one-sided paired t-test for a loss at most {margin:g} nats above the "
            f"reference's at 2T, corrected for the tests of this table (Holm).",
        ),
        Section(
            "Data efficiency by the reference's power law over horizons",
            efficiency_rows(groups, base),
            explain_fit(base),
        ),
    ]
    filled = []
    for section in sections:
        if section.rows:
            filled.append(Section(section.title, without_empty(section.rows), section.explanation))
    return Report(verdicts(comparisons), notes(runs) + notes_on_choice(groups, base), filled)


def notes(runs: list[StoredRun]) -> list[str]:
    """Return what a reader must know about the runs before the tables."""
    lines = []
    for run in runs:
        if run.is_diverged:
            skipped = f", {run.skipped:,} steps skipped" if run.skipped else ""
            lines.append(f"note: {run.name} has diverged, step {run.step:,}{skipped}")
        elif not run.is_finished:
            lines.append(
                f"note: {run.name} is unfinished, step {run.step:,} of {run.horizon:,}: left out"
            )
        origin = run.environment.get("branched_from")
        if origin:
            source, _, step = origin.rpartition("@")
            lines.append(f"note: {run.name} is a branch: its first {step} steps are {source}'s")

    for copies in repeated_runs(runs):
        folders = ", ".join(run.where for run in copies)
        lines.append(f"warning: the same settings and seed, kept apart: {folders}")
    for difference in confounders(runs):
        lines.append(f"warning: the runs differ in more than the optimizer. {difference}")
    return lines


def notes_on_choice(groups: list[Group], base: dict[Key, Group]) -> list[str]:
    """Return what a reader must know about the settings that are compared."""
    if not base:
        return ["note: without AdamW there is nothing to compare with; name a run by --reference"]
    counts = Counter(group.table for group in groups if group.tokens == groups[0].tokens)
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"{table} {count}" for table, count in counts.items())
        return [f"warning: more settings were tried for some than for others: {numbers}"]
    return []


def references(groups: list[Group], name: str | None) -> dict[Key, Group]:
    """Return {tokens and batch: the group to compare with}, all of one run of the experiment file.

    If a sweep has several settings for it, the best one counts.
    """
    chosen = [group for group in groups if group.optimizer == "adamw"][:1]
    if name:
        chosen = [group for group in groups if name in (group.table, group.name)]
        if not chosen:
            tables = ", ".join(dict.fromkeys(group.table for group in groups))
            raise UserError(f"--reference={name}: no such finished run; there are: {tables}")

    best: dict[Key, Group] = {}
    for group in groups:
        if chosen and group.table == chosen[0].table:
            other = best.get(key_of(group))
            if other is None or group.rank < other.rank:
                best[key_of(group)] = group
    return best


def key_of(group: Group) -> Key:
    return Key(group.task, group.tokens)


# ---- Tables --------------------------------------------------------------------------------------


def format_table(rows: list[Row]) -> str:
    """Return rows as a Markdown table, names aligned to the left and numbers to the right."""
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    sides = ["left" if column in ("run", "verdict") else "right" for column in columns]
    return tabulate(rows, headers="keys", tablefmt="pipe", colalign=sides, disable_numparse=True)


@dataclass(frozen=True)
class Comparison:
    """A group beside the reference of equal tokens and batch."""

    group: Group
    reference: Group | None  # None if there is none, or the group is it
    difference: Difference | None
    p: float | None  # corrected for all comparisons of the report
    verdict: str


def compare_groups(groups: list[Group], base: dict[Key, Group], margin: float) -> list[Comparison]:
    """Compare each group with its reference."""
    pairs = []
    for group in groups:
        reference = base.get(key_of(group))
        if reference is group:
            reference = None
        difference = compare_losses(group, reference, margin) if reference else None
        pairs.append((group, reference, difference))

    tests = [difference.test if difference else None for _, _, difference in pairs]
    p_values = holm([test.p if test else None for test in tests])
    comparisons = []
    for (group, reference, difference), p in zip(pairs, p_values, strict=True):
        found = "–"
        if group.diverged:
            found = "diverged"
        elif reference is not None and reference.diverged:
            found = "reference diverged"
        elif difference:
            found = describe(difference, p, margin)
        elif reference is not None:
            found = "no common seed"
        elif key_of(group) not in base:
            found = "no reference"
        comparisons.append(Comparison(group, reference, difference, p, found))
    return comparisons


def verdicts(comparisons: list[Comparison]) -> list[str]:
    """Return a sentence for each run of the file at the longest horizon that was compared.

    Of several settings, as in a sweep, it is about the best.
    """
    compared = [one for one in comparisons if one.reference is not None]
    longest: dict[str, int] = {}
    for one in compared:
        longest[one.group.task] = max(longest.get(one.group.task, 0), one.group.tokens)

    best: dict[tuple[str, str], Comparison] = {}
    for one in sorted(compared, key=lambda one: one.group.rank, reverse=True):
        is_other = one.reference is not None and one.group.table != one.reference.table
        if is_other and one.group.tokens == longest[one.group.task]:
            best[one.group.task, one.group.table] = one

    sentences = []
    for one in best.values():
        assert one.reference is not None
        tokens = format_tokens(one.group.tokens)
        against = f"{one.group.name} against {one.reference.name}, {tokens} tokens"
        if one.difference is None or one.difference.test is None:
            sentences.append(f"verdict: {against}: not tested, {one.verdict}")
            continue
        sentences.append(
            f"verdict: {against}: {one.verdict} ({one.difference.mean:+.4f} nats, 95 % interval "
            f"{format_interval(one.difference.test)}, {one.difference.pairs} pairs, "
            f"p {format_p(one.p)})"
        )
    return sentences


def without_empty(rows: list[Row]) -> list[Row]:
    """Return the rows without the columns that have a dash in all of them."""
    kept: list[Row] = []
    for row in rows:
        kept.append({})
        for column, text in row.items():
            if any(other.get(column, "–") != "–" for other in rows):
                kept[-1][column] = text
    return kept


def loss_row(comparison: Comparison) -> Row:
    """Return a group's final loss, and its difference from the reference."""
    group, difference = comparison.group, comparison.difference
    row = {
        "run": group.name,
        "seeds": str(len(group.runs)),
        "steps": f"{group.horizon:,}",
        "val loss": format_loss(group),
        "minus reference": "–",
        "95 % interval": "–",
        "pairs": "–",
        "p": "–",
        "detectable": "–",
        "verdict": comparison.verdict,
    }
    if difference:
        row["minus reference"] = f"{difference.mean:+.4f}"
        row["pairs"] = str(difference.pairs)
    if difference and difference.test:
        row["95 % interval"] = format_interval(difference.test)
        row["p"] = format_p(comparison.p)
        row["detectable"] = f"{difference.test.detectable:.4f}"
    return row


def format_loss(group: Group) -> str:
    """Return a group's loss ± deviation, or with diverged runs their number and the median."""
    if not group.diverged:
        deviation = "" if group.deviation is None else f" ± {group.deviation:.4f}"
        return f"{group.loss:.4f}{deviation}"
    median = f", median {group.loss:.4f}" if math.isfinite(group.loss) else ""
    return f"{group.diverged} of {len(group.runs)} diverged{median}"


def format_interval(test: PairedTest) -> str:
    return f"{test.low:+.4f} to {test.high:+.4f}"


def format_p(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def explain_losses(comparisons: list[Comparison], margin: float) -> str:
    """Return the sentences below the table of final losses."""
    tested = sum(comparison.p is not None for comparison in comparisons)
    if not tested:
        return ""
    return (
        f"Differences are paired over common seeds. p: two-sided t-test, corrected for the number "
        f"of comparisons in this table, {tested} (Holm). Equal: two one-sided tests with a margin "
        f"of {margin:g} nats. Detectable: the true difference that an uncorrected test of this "
        f"many pairs finds with 80 % power. Intervals and tests for equality are not corrected, "
        f"and a setting that was chosen as the best of several looks better than it is: run it "
        f"again with new seeds."
    )


def cost_row(group: Group) -> Row:
    """Return a run's tokens, FLOPs and times."""
    config = group.runs[0].config
    step, estimate = step_times(group.runs)
    share = overhead(group.runs)
    clipped = []
    for run in group.runs:
        clipped += [record["clipped"] for record in run.records if "clipped" in record]
    return {
        "run": group.name,
        "tokens": format_tokens(group.tokens),
        "FLOPs": f"{step_flops(config) * group.horizon:.3g}",
        "hours": f"{mean_seconds(group) / 3600:.3f}",
        "T(step) ms": "–" if step is None else f"{step:.1f}",
        "T(Hessian) ms": "–" if estimate is None else f"{estimate:.1f}",
        "overhead": "–" if share is None else f"{share:.1%}",
        "clipped": f"{sum(clipped) / len(clipped):.1%}" if clipped else "–",
    }


def mean_seconds(group: Group) -> float:
    """Return the seconds that a run of the group has taken, the mean over seeds."""
    return sum(run.validations[-1]["seconds"] for run in group.runs) / len(group.runs)


def format_tokens(tokens: int) -> str:
    """Return a number of tokens with three digits: 8.19K, 491M, 49.2B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if tokens >= size:
            return f"{tokens / size:,.3g}{unit}"
    return str(tokens)


def target_rows(groups: list[Group], base: dict[Key, Group], target: float | None) -> list[Row]:
    """Return, for each run of the file, its shortest schedule that ends at the target or below.

    Losses are compared as they are printed, with four digits, and diverged runs do not count.
    """
    rows = []
    tasks = list(dict.fromkeys(group.task for group in groups))
    for task in tasks:
        own = [group for group in groups if group.task == task and not group.diverged]
        goal = common_target(own, base) if target is None else target
        if goal is None:
            continue
        for table in dict.fromkeys(group.table for group in own):
            settings = [group for group in own if group.table == table]
            name = table if len(tasks) == 1 else settings[0].name.split(",")[0]
            row = {"run": name, "target": f"{goal:.4f}"}
            reached = [group for group in settings if round(group.loss, 4) <= round(goal, 4)]
            if not reached:
                rows.append(row | {"steps": "not reached"})
                continue
            shortest = min(reached, key=lambda group: group.tokens)
            flops = step_flops(shortest.runs[0].config) * shortest.horizon
            row |= {"steps": f"{shortest.horizon:,}", "tokens": format_tokens(shortest.tokens)}
            row |= {"FLOPs": f"{flops:.3g}", "seconds": f"{mean_seconds(shortest):,.0f}"}
            rows.append(row)
    return rows


def common_target(groups: list[Group], base: dict[Key, Group]) -> float | None:
    """Return the reference's loss at the longest horizon that another run has too."""
    shared = []
    for group in groups:
        reference = base.get(key_of(group))
        if reference and not reference.diverged and group.table != reference.table:
            shared.append(reference)
    return max(shared, key=lambda group: group.tokens).loss if shared else None


def doubled_rows(groups: list[Group], base: dict[Key, Group], margin: float) -> list[Row]:
    """Return each run at T beside the reference at T and at 2T."""
    compared = []
    for group in groups:
        once, twice = base.get(key_of(group)), base.get(Key(group.task, 2 * group.tokens))
        if once is not None and twice is not None and once is not group:
            compared.append((group, once, twice, compare_losses(group, twice, margin)))
    tests = [difference.test if difference else None for *_, difference in compared]
    p_values = holm([test.p_not_worse if test else None for test in tests])

    rows = []
    for (group, once, twice, difference), test, p in zip(compared, tests, p_values, strict=True):
        row = {
            "run": group.name,
            "T": f"{group.horizon:,}",
            "loss at T": format_loss(group),
            "reference at T": format_loss(once),
            "reference at 2T": format_loss(twice),
            "minus 2T": f"{difference.mean:+.4f}" if difference else "–",
            "95 % interval": format_interval(test) if test else "–",
            "pairs": str(difference.pairs) if difference else "–",
            "p": format_p(p),
            "as good as 2T": "not tested",
        }
        if once.loss - twice.loss <= margin:
            row["as good as 2T"] = "margin too wide"  # the reference itself gains less by 2T
        elif test and p is not None:
            row["as good as 2T"] = "not shown"
            if p < 1 - CONFIDENCE:
                row["as good as 2T"] = "yes"
            elif test.low > 0:
                row["as good as 2T"] = "no"
        rows.append(row)
    return rows


def efficiency_rows(groups: list[Group], base: dict[Key, Group]) -> list[Row]:
    """Return how many tokens the reference would need for a run's loss, over the run's own."""
    rows = []
    for task in dict.fromkeys(group.task for group in groups):
        horizons = fitted(base, task)
        law = fit_power_law([(horizon.tokens, horizon.loss) for horizon in horizons])
        for group in groups:
            is_other = group.task == task and group not in horizons
            if law is None or group.diverged or not is_other:
                continue
            found = data_efficiency(group, horizons)
            if found is None:
                continue
            value, low, high = found
            is_inside = math.isfinite(value) and law.covers(value * group.tokens)
            finite = f"{value:.2f}" if math.isfinite(value) else "below the fit's floor"
            rows.append(
                {
                    "run": group.name,
                    "D_eff / D": finite,
                    "95 % interval": "–" if math.isnan(low) else f"{low:.2f} to {high:.2f}",
                    "within the fit": "yes" if is_inside else "no, extrapolated",
                }
            )
    return rows


def fitted(base: dict[Key, Group], task: str) -> list[Group]:
    """Return the reference's horizons in a task that have not diverged."""
    return [group for group in base.values() if group.task == task and not group.diverged]


def explain_fit(base: dict[Key, Group]) -> str:
    """Return the sentences below the table of data efficiency."""
    lines = ["Intervals, from five common seeds on: bootstrap."]
    for task in dict.fromkeys(group.task for group in base.values()):
        horizons = fitted(base, task)
        law = fit_power_law([(horizon.tokens, horizon.loss) for horizon in horizons])
        if law is not None:
            unit, name = format_tokens(int(law.points[0][0])), horizons[0].name.split(",")[0]
            lines.append(
                f"Fit of {name}: {law.a:.3g} (D/{unit})^−{law.b:.3g} + {law.c:.3g}, largest "
                f"residual {law.largest_residual():.4f}."
            )
            lines += [f"Warning: {doubt}." for doubt in law.doubts()]
    return " ".join(lines)


# ---- Files ---------------------------------------------------------------------------------------


def summary(run: StoredRun) -> dict[str, Any]:
    """Return a run as one small JSON object: its config, its environment, and how it ended."""
    last = run.validations[-1]
    step, estimate = step_times([run])
    clipped = [record["clipped"] for record in run.records if "clipped" in record]
    curve = []
    for validation in run.validations:
        if math.isfinite(validation["val_loss"]):
            curve.append([validation["step"], round(validation["val_loss"], 4)])
    return {
        "name": run.name,
        "finished": run.is_finished,
        "diverged": run.is_diverged,
        "step": run.step,
        "val_loss": last["val_loss"] if math.isfinite(last["val_loss"]) else None,
        "seed": run.seed,
        "tokens": run.step * tokens_per_step(run.config),
        "seconds": last["seconds"],
        "flops": step_flops(run.config) * run.step,
        "step_ms": step,
        "hessian_ms": estimate,
        "clipped_share": sum(clipped) / len(clipped) if clipped else None,
        "curve": curve,
        "environment": run.environment,
        "config": run.config,
    }


def write_files(out: Path, runs: list[StoredRun], report: Report) -> list[str]:
    """Write compare.md, .csv, .json, .png, .svg, and .html if plotly is installed.

    Returns the suffixes of the files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    summaries = [summary(run) for run in runs]
    write_text(out / "compare.md", report.as_markdown() + "\n")
    write_text(out / "compare.csv", _as_csv(summaries))
    lines = ",\n".join(json.dumps(one) for one in summaries)  # one run per line
    write_text(out / "compare.json", f"[\n{lines}\n]\n")
    plots.draw_curves(runs, [out / "compare.png", out / "compare.svg"])

    suffixes = ["md", "csv", "json", "png", "svg"]
    if plots.write_page(runs, report_as_html(report), out / "compare.html"):
        suffixes.append("html")
    return suffixes


def report_as_html(report: Report) -> tuple[str, str]:
    """Return what stands above the charts of the page, and what stands below."""
    above = "".join(f"<p><strong>{html.escape(line)}</strong></p>" for line in report.verdicts)
    below = "".join(f"<p>{html.escape(line)}</p>" for line in report.notes)
    for section in report.sections:
        table = tabulate(section.rows, headers="keys", tablefmt="html", disable_numparse=True)
        below += f"<h2>{html.escape(section.title)}</h2><div class=table>{table}</div>"
        below += f"<p>{html.escape(section.explanation)}</p>"
    return above, below


def _as_csv(summaries: list[dict[str, Any]]) -> str:
    nested = ("curve", "environment", "config")
    columns = [key for key in summaries[0] if key not in nested]
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(summaries)
    return table.getvalue()
