"""``distill plan``: a plan on the terminal, or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from distill.config import load_config
from distill.plan import GIB, Plan, make_plan
from distill.plan_advice import Advice, advise, parse_gpu

_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def plan(recipe: str, overrides: Sequence[str], gpu: str | None, as_json: bool) -> int:
    """The command. With ``gpu`` the run is planned for a CUDA device, wherever this is."""
    room = parse_gpu(gpu) if gpu else None
    config = load_config(recipe, overrides, anywhere=True)
    made = make_plan(config, "cuda" if room is not None or config.trainer.device == "cuda" else None)
    advice = None if room is None else advise(config, made, room)
    if as_json:
        print(json.dumps(made.to_json() | ({} if advice is None else {"advice": advice.to_json()}), indent=2))
    else:
        print_plan(made, advice)
    return 0


def print_plan(plan: Plan, advice: Advice | None = None) -> None:
    """Tables on a terminal; the same columns, plain, where there is none."""
    micro = f" × {plan.accumulate}" if plan.accumulate > 1 else ""
    shape = "×".join(map(str, plan.sample_shape))
    print(f"{plan.method} · {plan.pipeline} ({plan.backbone}) · samples {shape} · batch {plan.batch_size}{micro} · {plan.device}\n")
    _table(("role", "parameters", "trained", "forwards a step", "updates a step"), _roles(plan))
    print()
    peak = [[part, size(n), f"{n / plan.peak:.0%}"] for part, n in sorted(plan.memory.items(), key=lambda item: -item[1])]
    _table(("memory at the peak", "GiB", ""), [*peak, ["peak" + (f" (during: {plan.during})" if plan.during else ""), size(plan.peak), ""]], total=True)
    print()
    if plan.flops:
        print(f"a step: {work(sum(plan.flops.values()))}: " + ", ".join(f"{what} {work(n)}" for what, n in plan.flops.items() if n))
    disk = plan.disk
    kept = f"checkpoints {gigabytes(disk['checkpoints'])} ({gigabytes(disk['checkpoint'])} each)"
    print(f"on disk: {kept}, cached data {gigabytes(disk['cache'])}, export {gigabytes(disk['export'])}")
    if plan.before:
        print("before training, to encode and decode: " + ", ".join(f"{name} {gigabytes(n)}" for name, n in plan.before.items()))
    for note in plan.notes:
        print(f"note: {note}")
    if advice is not None:
        print()
        print_advice(plan, advice)


def print_advice(plan: Plan, advice: Advice) -> None:
    """Whether it fits, and what would make it."""
    gpu = f"a GPU of {advice.gpu / GIB:g} GiB ({advice.usable / GIB:.1f} GiB for the run)"
    if advice.fits:
        print(f"fits {gpu}: {gigabytes(advice.usable - plan.peak)} to spare")
        return
    print(f"does not fit {gpu}: {gigabytes(plan.peak - advice.usable)} too much. Tried, in order of harm:")
    _table(("setting", "saves GiB", "peak GiB"), [[" ".join(step.settings), size(step.saves), size(step.peak)] for step in advice.steps])
    if advice.chosen:
        print("fits with: " + " ".join(f"--set {setting}" for setting in advice.chosen))
    else:
        print("no combination of these settings fits: use a smaller teacher, a smaller image size, or several GPUs")


def size(n: int) -> str:
    """GiB with as many digits as matter."""
    gib = n / GIB
    return f"{gib:.2f}" if gib >= 0.1 else f"{gib:.4f}"


def gigabytes(n: int) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / (1 << 20):.1f} MiB"


def work(n: float) -> str:
    """Floating-point operations in the unit that fits."""
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if n >= scale), (1.0, "FLOP"))
    return f"{n / scale:.3g} {unit}"


def count(n: int) -> str:
    """Parameters."""
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.1f} k" if n >= 1e3 else str(n)


def _roles(plan: Plan) -> list[list[str]]:
    rows = []
    for role, numbers in plan.parameters.items():
        calls = [f"{call['forwards']:g}" + (f" × {call['batch']}" if call["batch"] > 1 else "") for call in plan.calls if call["role"] == role]
        trained = count(numbers["trained"]) if numbers["trained"] else "–"
        rows.append([role, count(numbers["parameters"]), trained, " + ".join(calls) or "–", str(plan.updates.get(role, "–"))])
    return rows


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], total: bool = False) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for i, title in enumerate(titles):
            table.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
        for i, row in enumerate(rows):
            if total and i == len(rows) - 1:
                table.add_section()
            table.add_row(*row)
        console = Console()
        Console(width=max(console.width, 40)).print(table)
        return
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    for row in [titles, *rows]:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip())
