"""The command line: ``distill train | plan | sample | eval | export | teachers | verify | methods``.

Only this file talks to the user. Whatever a user can get wrong ends in one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from distill import __version__
from distill.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return int(options.run(options) or 0)
    except UserError as error:
        print(f"distill: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("distill: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="distill", description="Distill a diffusers pipeline into one that samples in 1 to 8 steps.")
    parser.add_argument("--version", action="version", version=f"distill {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser("train", help="train a student from a recipe; export and measure it")
    train.add_argument("recipe", nargs="?", help="a YAML file, a shipped recipe (quickstart), or a run folder to resume")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting: method.critic_steps=2")
    train.add_argument("--resume", action="store_true", help="continue the run in output.folder from its newest checkpoint")
    train.add_argument("--overwrite", action="store_true", help="delete the run that is in output.folder")
    train.add_argument("--dry-run", action="store_true", help="check the recipe and print it with every default, train nothing")
    train.add_argument("--print-schema", action="store_true", help="print the recipe's JSON schema, for editors")
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="what a run will take in memory, work and disk, from configuration files alone")
    plan.add_argument("recipe", help="a YAML file, a shipped recipe or a run folder")
    plan.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting: trainer.batch_size=4")
    plan.add_argument("--gpu", metavar="SIZE", help="does it fit a GPU of this memory (24GB), and if not, with which settings")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON, sizes in bytes")
    plan.set_defaults(run=_plan)

    sample = commands.add_parser("sample", help="sample images from a run, an exported student or any diffusers pipeline")
    sample.add_argument("path", help="run folder, exported folder, pipeline folder or hub id")
    sample.add_argument("--inputs", nargs="+", metavar="INPUT", help="prompts or class labels, one per image; all classes if not given")
    sample.add_argument("--count", type=_positive, help="number of images; the inputs repeat")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", type=Path, default=Path("samples.png"), help="a PNG file for a grid, or a folder for one file per image")
    _add_call_options(sample)
    sample.set_defaults(run=_sample)

    evaluate = commands.add_parser("eval", help="measure pipelines and compare them in one table")
    evaluate.add_argument("paths", nargs="+", metavar="PATH", help="run folder, exported folder, pipeline folder or hub id")
    evaluate.add_argument("--metrics", type=_names, default=["fd-digits", "kid", "accuracy"], help="comma-separated: fd-digits,kid,accuracy,…")
    evaluate.add_argument("--samples", type=_positive, default=5000)
    evaluate.add_argument("--batch-size", type=_positive, default=250)
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--prompts", type=Path, help="for text pipelines: a file with a prompt a line")
    evaluate.add_argument("--reference", type=Path, help="for fid: a folder of real images")
    evaluate.add_argument("--out", type=Path, help="write the rows to this JSON file")
    _add_call_options(evaluate)
    evaluate.set_defaults(run=_eval)

    export = commands.add_parser("export", help="write a run's student as a diffusers folder or a LoRA")
    export.add_argument("path", type=Path, help="run folder")
    export.add_argument(
        "--to", choices=("diffusers", "few-step", "lora", "lora-kohya"),
        help="the teacher's own pipeline class; a class in the folder that needs no arguments; the adapter alone, in diffusers' or kohya's names. "
        "The first that samples this student as it was trained, if not given",
    )
    export.add_argument("--out", type=Path, help="folder to write; RUN/student, RUN/few-step, RUN/lora or RUN/lora-kohya if not given")
    export.add_argument("--max-shard-size", metavar="SIZE", help="largest size of one weight file, such as 5GB; diffusers' own default if not given")
    export.add_argument("--variant", choices=("fp16", "bf16"), help="write the weights in half precision, to be loaded with variant=")
    export.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to a hub repository afterwards; asks first")
    export.add_argument("--yes", action="store_true", help="do not ask before --push uploads")
    export.set_defaults(run=_export)

    verify = commands.add_parser("verify", help="check methods against closed forms, with the ablations that must fail")
    verify.add_argument("methods", nargs="*", metavar="METHOD", help="all methods if none is given; module:Class for your own")
    verify.add_argument("--divergence", action="append", help="of dmd2: check this one only (may repeat)")
    verify.add_argument("--jobs", type=_positive, metavar="N", help="methods at a time; as many as there are cores if not given")
    verify.set_defaults(run=_verify)

    teachers = commands.add_parser("teachers", help="list the pipelines that were checked, or probe one of your own")
    teachers.add_argument("path", nargs="?", help="pipeline folder or hub id: probe it and print what was found")
    teachers.add_argument("--task", help="list this task only: text-to-image, …")
    teachers.add_argument("--call", action="append", default=[], metavar="NAME=VALUE", help="further argument of the pipeline's call: height=512")
    teachers.add_argument("--override", metavar="MODULE:NAME", help="what you know of the pipeline and probing does not")
    teachers.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    teachers.add_argument("--trust-remote-code", action="store_true", help="run code that lies in the pipeline's folder; read it first")
    teachers.set_defaults(run=_teachers)

    methods = commands.add_parser("methods", help="list the methods and their settings")
    methods.add_argument("name", nargs="?", help="show this method's settings")
    methods.set_defaults(run=_methods)
    return parser


def _add_call_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=_positive, help="network calls per sample; what the pipeline was made for if not given")
    parser.add_argument("--guidance-scale", type=float, help="what the pipeline was made for if not given")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that lies in the pipeline's folder; read it first")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1, not {value}")
    return value


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("name at least one metric")
    return names


# -- commands -----------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    from distill import config as configs

    if options.print_schema:
        import json

        print(json.dumps(configs.schema(), indent=2))
        return 0
    if options.recipe is None:
        raise UserError(f"name a recipe: a YAML file, or one of {', '.join(configs.recipes())}")
    config = configs.load_config(options.recipe, options.set)
    if options.dry_run:
        print(configs.dump(config), end="")
        return 0
    from distill.commands import train

    return train(config, resume=options.resume, overwrite=options.overwrite)


def _plan(options: argparse.Namespace) -> int:
    from distill.plan_table import plan

    return plan(options.recipe, options.set, options.gpu, options.json)


def _sample(options: argparse.Namespace) -> int:
    from distill.commands import sample

    return sample(options)


def _eval(options: argparse.Namespace) -> int:
    from distill.commands import evaluate

    return evaluate(options)


def _export(options: argparse.Namespace) -> int:
    from distill.commands import export

    return export(options)


def _teachers(options: argparse.Namespace) -> int:
    if options.path is None:
        from distill.teachers import print_checked

        print_checked(options.task)
        return 0
    from distill.commands import probe

    return probe(options)


def _verify(options: argparse.Namespace) -> int:
    from distill.verify import run

    return 0 if run(options.methods or None, options.divergence, options.jobs) else 1


def _methods(options: argparse.Namespace) -> int:
    import inspect
    import textwrap

    from distill.describe import settings
    from distill.methods import available, find_method

    if options.name is None:
        width = max(map(len, available()))
        for name, method in sorted(available().items()):
            print(f"{name:{width}}  {_first_line(method)}")
        return 0
    try:
        method = find_method(options.name)
    except KeyError:
        raise UserError(f"there is no method {options.name!r}; known: {', '.join(available())}") from None
    print(f"{options.name}: {_first_line(method)}")
    module = inspect.getdoc(sys.modules[method.__module__])
    print(f"\n{module}\n" if module else "")
    for setting in settings(method):
        if setting.name != "name":
            print(f"  {setting.name}: {setting.default}    ({setting.kind})")
            if setting.comment:
                print(textwrap.fill(setting.comment, 120, initial_indent="      ", subsequent_indent="      "))
    return 0


def _first_line(method: type[Any]) -> str:
    return (method.__doc__ or "").strip().split("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
