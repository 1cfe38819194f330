"""A plan as tables for people: memory per stage, and work."""

from rich.console import Console
from rich.table import Column, Table

from pgenrm_train.cluster.planning.memory import card_name, card_of
from pgenrm_train.cluster.planning.plan import Plan, StagePlan


def show(plan: Plan, console: Console | None = None) -> None:
    console = console or Console(highlight=False, soft_wrap=True)
    config, card = plan.config, card_of(plan.config)
    console.print(
        f"{config.model.label}: {plan.geometry.parameters / 1e6:,.1f} M parameters · "
        f"{config.cluster.ranks} × {card_name(config)} ({card.memory_gib:g} GiB) "
        f"on {config.cluster.nodes} node(s)",
        markup=False,
    )
    console.print(memory_table(plan))
    console.print(work_table(plan))
    for stage in plan.stages:
        for line in sentences(stage):
            console.print(line, markup=False)
    console.print(totals(plan), markup=False)


def memory_table(plan: Plan) -> Table:
    table = _table("Memory", "stage", "phase", "GiB by part (the fullest process)", "sum", "of", "")
    for stage in plan.stages:
        for phase in stage.phases:
            parts = ", ".join(f"{name} {gib:.2f}" for name, gib in phase.parts.items() if gib >= 0.005)
            if phase.host_parts:
                host = ", ".join(f"{name} {gib:.1f}" for name, gib in phase.host_parts.items())
                parts += f"; in a node's own memory: {host}"
            verdict = "fits" if phase.fits else "DOES NOT FIT"
            table.add_row(
                stage.stage, phase.name, parts, f"{phase.total:.1f}", f"{phase.available:g}", verdict
            )
    return table


def work_table(plan: Plan) -> Table:
    table = _table(
        "Work (assumed rates, see docs/plan.md)", "stage", "counts", "M tokens", "hours", "disk, GiB"
    )
    for stage in plan.stages:
        work = stage.work
        batches = stage.batches.facts if stage.batches else {}
        table.add_row(
            stage.stage,
            ", ".join(f"{k} {v:,}" for k, v in {**work.counts, **batches}.items() if v),
            ", ".join(f"{k} {v / 1e6:,.2f}" for k, v in work.tokens.items()),
            ", ".join(f"{k} {v:.2f}" for k, v in work.hours.items()),
            f"{sum(work.disk.values()):.1f}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    """A table that breaks long words in a narrow terminal instead of cutting them."""
    return Table(*(Column(name, overflow="fold") for name in columns), title=title, title_justify="left")


def sentences(stage: StagePlan) -> list[str]:
    """Problems with the nearest change, warnings, then sizes, notes and assumptions."""
    lines = [f"✗ {problem}" for problem in stage.problems]
    if stage.problems:
        lines.append(
            f"  nearest change of {stage.stage} that fits: {' '.join(stage.change)}"
            if stage.change
            else f"  no small set of changes makes {stage.stage} fit: use another cluster"
        )
    lines += [f"! {warning}" for warning in stage.warnings]
    lines += [f"· {stage.sizes}"] if stage.sizes else []
    if stage.host:
        parts = ", ".join(f"{name} {gib:.0f}" for name, gib in stage.host.items())
        lines.append(f"· {stage.stage}: a node's own memory {sum(stage.host.values()):.0f} GiB ({parts})")
    lines += [f"· {stage.stage}: {note}" for phase in stage.phases for note in phase.notes]
    return lines + [f"· {stage.stage} assumes: {text}" for text in stage.work.assumptions]


def totals(plan: Plan) -> str:
    api = sum(stage.work.api_dollars for stage in plan.stages)
    return (
        f"in all about {plan.hours:.2f} hours, ${plan.dollars:,.2f}"
        + (f" (${api:,.2f} of it for APIs)" if api else "")
        + f", {plan.disk_gib:.1f} GiB of disk; start-up and waiting are not counted"
        + ("" if plan.fits else ", nor are the stages that do not fit")
    )
