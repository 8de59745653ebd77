"""The commands: `hf-distill run | sweep | record | plan | evaluate | report | publish`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_distill import __version__
from hf_distill.cli.exit_codes import guarded
from hf_distill.errors import InputError

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML file, as in recipes/. See docs/recipes.md.")
]
Folders = Annotated[
    list[Path],
    typer.Argument(metavar="FOLDER...", help="Run folders, or a folder that holds run folders."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in train.alpha=0.9."),
]
SweepOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE,...",
        help="Set a key to each of these values, as in seed=0,1,2, or to a single one.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

app = typer.Typer(
    help="Distil a large model into a small one, and measure the gain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=lambda wanted: _print_version(wanted),
            is_eager=True,
            help="Show the version.",
        ),
    ] = False,
) -> None:
    pass


@app.command(short_help="Run a recipe, from raw text to the report.")
def run(
    recipe: RecipeFile,
    set_: Overrides = None,
    share_with: Annotated[
        Path | None,
        typer.Option(
            "--share-with",
            metavar="FOLDER",
            help="A folder of other runs; results that were made from the same inputs are reused.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a recipe: prepare, teacher, annotate, record, student, baseline, off_policy, train,
    evaluate, report.

    Stages whose inputs have not changed are skipped. An interrupted stage resumes from its last
    complete checkpoint. All results are in the run folder, output_dir/name.

    \b
    hf-distill run recipes/quickstart.yaml
    hf-distill run recipes/quickstart.yaml --set name=lora --set student.lora.r=8
    hf-distill run recipes/gpt2.yaml --set train.max_steps=100 --set "data.train=my/*.txt"
    accelerate launch --config_file recipes/accelerate/cpu2.yaml recipes/distill.py RECIPE
    """
    with guarded(debug):
        from hf_distill.recipes import load_recipe
        from hf_distill.recipes.stages import STAGES, open_run

        with open_run(load_recipe(recipe, set_ or ()), recipe, share_with) as this_run:
            for stage in STAGES:
                stage(this_run)


@app.command(short_help="Run a recipe over a grid of settings, and compare the runs.")
def sweep(recipe: RecipeFile, set_: SweepOverrides = None, debug: Debug = False) -> None:
    """Run a recipe for every combination of the values given, one run after the other.

    Several values of a key are separated by commas. Commas inside brackets, braces or quotes do not
    separate, so that a list is one value.

    Each run has its run folder in output_dir/name-sweep, named by the keys that vary, such as
    temperature-2_seed-0. Stages with the same inputs (data, teacher, recording, initial student,
    baseline) run once and their results are shared. After an interruption, run the same command
    again.

    At the end a table and the page compare.html show the runs side by side, and the seeds of each
    setting as mean and standard deviation. `hf-distill report` writes the page again.

    Each run is one process. A sweep does not work under `accelerate launch`.

    \b
    hf-distill sweep recipes/quickstart.yaml --set train.temperature=1,2,4 --set seed=0,1,2
    hf-distill sweep recipes/gpt2.yaml --set train.divergence=forward_kl,jsd --set name=kl-or-jsd
    hf-distill sweep recipes/gpt2.yaml --set "student.layers=[0, 6, 11],every_other"
    """
    with guarded(debug):
        from hf_distill.recipes.sweep import run_sweep

        typer.echo(run_sweep(recipe, set_ or ()))


@app.command(short_help="Record a teacher over a recipe's rows, without training a student.")
def record(
    recipe: RecipeFile,
    set_: Overrides = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Only estimate size and hours, from a timed sample.",
        ),
    ] = False,
    price: Annotated[
        float | None,
        typer.Option(
            "--price", min=0, help="With --estimate: the price of an hour of this machine."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Record a teacher over a recipe's rows: stages prepare, teacher, annotate and record.

    Then run `hf-distill run` with the same recipe to train from the recording. The recipe needs a
    `record` section; `--set record.k=64` adds one. An interrupted recording resumes from its last
    finished shard.

    \b
    hf-distill record recipes/quickstart_recorded.yaml --estimate --price 2.5
    hf-distill record recipes/quickstart_recorded.yaml
    """
    with guarded(debug):
        from hf_distill.recipes import load_recipe, stages
        from hf_distill.recipes.stages.recording import check_records, estimate_recording

        given = load_recipe(recipe, set_ or ())
        check_records(given)
        with stages.open_run(given, recipe) as this_run:
            stages.prepare(this_run)
            stages.teacher(this_run)
            stages.annotate(this_run)
            if not estimate:
                stages.record(this_run)
                return
            size = estimate_recording(this_run)
            hours = size.seconds / 3600
            cost = "" if price is None else f", {hours * price:,.2f} at {price:g} an hour"
            this_run.log(
                f"record: {size.rows:,} training rows with about {size.targets:,} targets: "
                f"{size.bytes / 1e6:,.1f} MB at {size.bytes_per_target:.1f} bytes a target, "
                f"{hours:.2f} hours ({size.seconds:,.0f} s) at "
                f"{size.targets_per_second:,.0f} targets/s{cost}"
            )


@app.command(short_help="Estimate memory, hours and disk of a recipe.")
def plan(
    recipe: RecipeFile,
    devices: Annotated[
        int, typer.Option("--devices", min=1, help="How many devices (GPUs, or CPU processes).")
    ] = 1,
    memory: Annotated[
        str,
        typer.Option(
            "--memory", help="Memory of each device, such as 80GB; by default this machine's."
        ),
    ] = "",
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Estimate the memory of a recipe on each device, by part, and recommend how to run it.

    For causal language models only.

    A few real steps are measured on this machine with random weights and tokens. Models that are
    too large are measured with one and two layers. Memory is then computed for each engine. Only
    configs are downloaded, and nothing is written.

    \b
    hf-distill plan recipes/quickstart.yaml --devices 2 --memory 4GB
    hf-distill plan recipes/gpt2.yaml --devices 8 --memory 80GB
    """
    # One device is measured; if several were visible, Trainer would put a model on each.
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[0]
    with guarded(debug):
        import torch
        from rich.console import Console

        from hf_distill.recipes import load_recipe
        from hf_distill.recipes.planning import make_plan, memory_bytes
        from hf_distill.recipes.stages.inputs import check_arguments
        from hf_distill.teachers.placement import device_memory

        given = load_recipe(recipe, set_ or ())
        check_arguments(given)
        # A CPU's memory is shared by its processes.
        alike = 1 if torch.cuda.is_available() else devices
        room = memory_bytes(memory) if memory else device_memory() / alike
        found = make_plan(given, devices, room)
        Console(width=None if sys.stdout.isatty() else 120).print(found.table())
        for line in found.lines(str(recipe), set_ or ()):
            typer.echo(line)
        if found.recommended is None:
            raise InputError(found.advice)


@app.command(short_help="Measure the models of a finished run again.")
def evaluate(recipe: RecipeFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Measure the models of a finished run again, and write its report again.

    Use it on another machine, or after changing the recipe's `evaluate` section. Nothing is
    trained: it is an error if the models are not up to date with the recipe.

    \b
    hf-distill evaluate recipes/quickstart.yaml --set evaluate.prompts=8
    """
    with guarded(debug):
        from hf_distill.recipes import load_recipe
        from hf_distill.recipes.stages import measure_again, open_run

        with open_run(load_recipe(recipe, set_ or ()), recipe) as this_run:
            measure_again(this_run)


@app.command(short_help="Write the report of a run again, or compare several runs.")
def report(
    folders: Folders,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="File to write; by default report.html in the run folder, or compare.html "
            "in the folder that holds the runs.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the report of a run folder again, or one page that compares several runs.

    One run folder: report.html, with the results of that run.

    Several run folders, or a folder that holds run folders: compare.html, with the settings in
    which the runs differ, their results side by side, and their curves in the same plots. Runs that
    differ only in the seed are shown as mean and standard deviation. Unfinished runs are left out.
    Both pages are single files without scripts.

    \b
    hf-distill report runs/quickstart
    hf-distill report runs/*
    hf-distill report runs/quickstart-sweep --output comparison.html
    """
    with guarded(debug):
        from hf_distill.reporting.compare_runs import PAGE, write_comparison
        from hf_distill.reporting.report import write_report
        from hf_distill.reporting.runs import is_run

        # Files may match runs/* too.
        given = [folder for folder in folders if not folder.is_file()] or folders
        several = len(given) > 1 or (not is_run(given[0]) and any(given[0].glob("*/recipe.yaml")))
        if not several:
            typer.echo(write_report(given[0], output))
            return
        parents = {folder.parent for folder in given}
        common = given[0] if len(given) == 1 else parents.pop() if len(parents) == 1 else Path()
        page, unfinished = write_comparison(given, output or common / PAGE)
        if unfinished:
            names = ", ".join(folder.name for folder in unfinished)
            typer.echo(f"left out, because they are not finished: {names}", err=True)
        typer.echo(page)


@app.command(short_help="Push a student and its card to the Hub.")
def publish(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A run folder, or the folder of a saved student."),
    ],
    repo_id: Annotated[
        str | None, typer.Argument(help="owner/name on the Hub; by default the recipe's.")
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Visibility of a new repository; by default the recipe's."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Push a run's student to the Hub: weights, tokenizer and card, no pickled files.

    \b
    hf-distill publish runs/quickstart my-name/tiny-python --public
    """
    with guarded(debug):
        from hf_distill.recipes.sections import PublishSection
        from hf_distill.recipes.stages.run_folder import recipe_of
        from hf_distill.reporting.publishing import publish as push

        of_a_run = not (folder / "config.json").exists() and (folder / "student").is_dir()
        section = recipe_of(folder).publish if of_a_run else PublishSection()
        target = repo_id or section.repo_id
        if target is None:
            raise InputError(
                "no repository to publish to: give owner/name after the folder, or set "
                "publish.repo_id in the recipe"
            )
        hidden = section.private if private is None else private
        typer.echo(push(folder / "student" if of_a_run else folder, target, private=hidden))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-distill {__version__}")
        raise typer.Exit


def main() -> None:
    """The entry point of `hf-distill`."""
    app(prog_name="hf-distill")
