"""The README.md of an exported student: what it is, how to load it, how good it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distill import __version__
from distill.evaluate.table import markdown
from distill.sampling import Sampler


def model_card(
    *, title: str, method: str, teacher_name: str, sampler: Sampler, load: str, pipeline_tag: str, lora: bool,
    also: str | None = None, license: str | None = None, metrics: Sequence[dict[str, Any]] | None = None,
    networks: str | None = None,
) -> str:
    """Markdown with the hub's YAML header.

    Args:
        load: the code that loads and samples the student.
        also: code that loads it as the few-step pipeline, which needs no arguments.
        license: of the teacher, inherited; left out where unknown.
        networks: where there are several, which one answers when.
    """
    header: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": pipeline_tag,
        "tags": ["diffusers", "distillation", "few-step", method, *(["lora"] if lora else [])],
    }
    if license:
        header["license"] = license
    if teacher_name.count("/") == 1 and not teacher_name.startswith((".", "assets/")):
        header["base_model"] = teacher_name
        header["base_model_relation"] = "adapter" if lora else "finetune"
    steps = f"1 to {len(sampler.times)} steps (default {sampler.steps})" if len(sampler.times) > 1 else "1 step"
    if sampler.guidance_range is not None:
        low, high = sampler.guidance_range
        guidance = f"an input of the network: any `guidance_scale` from {low:g} to {high:g}, at no extra cost"
    elif sampler.guidance_scale == 1:
        guidance = "none was distilled; sample with `guidance_scale=1`"
    else:
        guidance = f"{sampler.guidance_scale:g}, folded into the weights; sample with `guidance_scale=1`"
    times = ", ".join(f"{t:g}" for t in sampler.times)
    lines = [
        "---\n" + yaml.safe_dump(header, sort_keys=False) + "---",
        f"# {title}",
        f"A {'LoRA' if lora else 'student'} distilled from `{teacher_name}` with `{method}` by distill {__version__}.",
        f"- **Steps**: {steps}\n- **Guidance**: {guidance}\n- **Negative prompts**: ignored\n"
        f"- **Sampler**: t = {times} of the teacher's schedule; {_noise(sampler.gamma)}"
        + (f"\n- **Networks**: {networks}" if networks else ""),
        "## Load it\n```python\n" + load.strip() + "\n```",
    ]
    if also is not None:
        lines.append("### With nothing to remember\nHere the number of steps, the times and the guidance are defaults:\n```python\n" + also.strip() + "\n```")
    if metrics:
        lines.append("## Measured\n" + markdown(metrics).strip())
    return "\n\n".join(lines) + "\n"


def _noise(gamma: float) -> str:
    if gamma in (0.0, 1.0):
        return "fresh noise at each" if gamma else "no fresh noise: the steps follow the ODE"
    return f"a share of {gamma:g} of the noise is fresh at each"


def license_of(pipeline_folder: Path) -> str | None:
    """The licence named in the header of a pipeline folder's model card, if there is one."""
    card = pipeline_folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return None
    try:
        header = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError:
        return None
    value = header.get("license") if isinstance(header, dict) else None
    return value if isinstance(value, str) else None
