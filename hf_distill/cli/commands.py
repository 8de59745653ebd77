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
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]

app = typer.Typer(
    help="Make a small language model from a large one, and see what was gained.",
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
            help="A folder of other runs: results made from the same inputs are taken from there.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a recipe: prepare, teacher, record, student, baseline, train, evaluate, report.

    Stages whose inputs have not changed are skipped; an interrupted one goes on from its last
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
def sweep(recipe: RecipeFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Run a recipe for every combination of the values given, one run after the other.

    Several values of a key stand between commas; a list in brackets is one value. The run folders
    are in output_dir/name-sweep. Results of stages with the same inputs (data, teacher, recording,
    baseline) are made once and shared. The same command goes on after an interruption. At the end
    the page compare.html and a table put the runs side by side, seeds as mean and standard
    deviation. Each run is one process; `accelerate launch` is not used.

    \b
    hf-distill sweep recipes/quickstart.yaml --set train.temperature=1,2,4 --set seed=0,1,2
    hf-distill sweep recipes/gpt2.yaml --set train.divergence=forward_kl,jsd --set seed=0,1
    """
    with guarded(debug):
        from rich.console import Console

        from hf_distill.recipes import sweep as sweeps
        from hf_distill.reporting.compare_runs import write_comparison
        from hf_distill.reporting.runs import find_runs, group_runs, groups_table

        planned = sweeps.plan_sweep(recipe, set_ or ())
        total = len(planned.points)
        typer.echo(f"sweep: {total} runs in {planned.folder}")
        for number, point in enumerate(planned.points, 1):
            typer.echo(f"sweep: run {number} of {total}, {point.name}")
            code = sweeps.run_point(recipe, point, planned.folder)
            if code:
                typer.echo(
                    f"error: run {point.name!r} ended with exit code {code}; the {number - 1} runs "
                    "before it are kept, and the same command goes on from here",
                    err=True,
                )
                raise typer.Exit(code)
        folders = [planned.folder / point.name for point in planned.points]
        page, _ = write_comparison(folders, planned.folder / sweeps.PAGE)
        _, groups = group_runs(find_runs(folders)[0])
        Console(width=None if sys.stdout.isatty() else 120).print(groups_table(groups))
        typer.echo(page)


@app.command(short_help="Record a teacher over a recipe's rows, and train nothing.")
def record(
    recipe: RecipeFile,
    set_: Overrides = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Estimate size and hours from a timed sample; record nothing.",
        ),
    ] = False,
    price: Annotated[
        float | None,
        typer.Option("--price", min=0, help="With --estimate: what an hour of this machine costs."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Record a teacher over a recipe's rows: stages prepare, teacher and record.

    `hf-distill run` with the same recipe then trains from the recording. Needs a `record` section,
    if only `--set record.k=64`. An interrupted recording goes on from its last finished shard.

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
        str, typer.Option("--memory", help="Of each device, as 80GB; by default this machine's.")
    ] = "",
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Estimate the memory of a recipe on each device, by part, and the first way to run that fits.

    A few real steps are measured on this machine with random weights and tokens; models that are
    too large are measured with one and two layers. Memory is then computed for each engine. Only
    configs are downloaded, and nothing is written.

    \b
    hf-distill plan recipes/quickstart.yaml --devices 2 --memory 4GB
    hf-distill plan recipes/gpt2.yaml --devices 8 --memory 80GB
    """
    # One device is measured; with several in sight, Trainer would put a model on each.
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

    For another machine, or other settings of the recipe's `evaluate` section. Nothing is trained:
    a run whose models are not up to date is refused.

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
            help="Where the comparison goes; by default compare.html in the runs' common folder.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the report.html of a run folder again, or one page that compares several runs.

    With several folders, or a folder that holds run folders, the page shows the settings that
    differ, the figures side by side (runs that differ in the seed only as mean and standard
    deviation), and the curves in one plot.

    \b
    hf-distill report runs/quickstart
    hf-distill report runs/*
    hf-distill report runs --output comparison.html
    """
    with guarded(debug):
        from hf_distill.reporting.compare_runs import write_comparison
        from hf_distill.reporting.report import write_report

        if len(folders) == 1 and output is None and not _holds_runs(folders[0]):
            typer.echo(write_report(folders[0]))
            return
        common = folders[0] if len(folders) == 1 else folders[0].parent
        # Other files may match runs/* too.
        given = [folder for folder in folders if folder.is_dir()] if len(folders) > 1 else folders
        page, unfinished = write_comparison(given, output or common / "compare.html")
        if unfinished:
            names = ", ".join(folder.name for folder in unfinished)
            typer.echo(f"left out, since they are not finished: {names}", err=True)
        typer.echo(page)


def _holds_runs(folder: Path) -> bool:
    return not (folder / "recipe.yaml").exists() and any(folder.glob("*/recipe.yaml"))


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
        typer.Option("--private/--public", help="Of a new repository; by default the recipe's."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Push a run's student to the Hub: weights, tokenizer and card; nothing pickled.

    \b
    hf-distill publish runs/quickstart my-name/tiny-python --public
    """
    with guarded(debug):
        from hf_distill.recipes.schema import PublishSection
        from hf_distill.recipes.stages.run_folder import recipe_of
        from hf_distill.reporting.publishing import publish as push

        of_a_run = not (folder / "config.json").exists() and (folder / "student").is_dir()
        section = recipe_of(folder).publish if of_a_run else PublishSection()
        target = repo_id or section.repo_id
        if target is None:
            raise InputError(
                "where to publish is not said: give owner/name after the folder, or set "
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
