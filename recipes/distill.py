"""Run a recipe from raw text to an evaluated student, as `hf-distill run` does.

    accelerate launch recipes/distill.py recipes/gpt2.yaml --set train.max_steps=100

runs on as many processes as accelerate starts. Copy this file to add a step of your own. A stage is
skipped if its inputs have not changed, and resumes if it was interrupted.
"""

import typer

from hf_distill.cli.commands import Debug, Overrides, RecipeFile
from hf_distill.cli.exit_codes import guarded
from hf_distill.recipes import load_recipe
from hf_distill.recipes.stages import (
    annotate,
    baseline,
    evaluate,
    open_run,
    prepare,
    record,
    report,
    student,
    teacher,
    train,
)


def main(recipe: RecipeFile, set_: Overrides = None, debug: Debug = False) -> None:
    with guarded(debug), open_run(load_recipe(recipe, set_ or ()), recipe) as run:
        prepare(run)  # raw text -> clean, tokenized, packed rows, and the tokenizer
        teacher(run)  # trained from scratch, unless the recipe names one
        annotate(run)  # the teacher's own targets for the student, if the recipe asks for them
        record(run)  # the teacher's outputs for every row, if the recipe records them
        student(run)  # from a config, a checkpoint, or layers of the teacher
        baseline(run)  # the same student trained on the labels alone
        train(run)  # the distillation
        evaluate(run)  # all of them on held-out rows, beside the teacher
        report(run)  # report.html, and the student's model card


if __name__ == "__main__":
    typer.run(main)
