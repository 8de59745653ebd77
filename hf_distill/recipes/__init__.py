"""Recipes: one YAML file, read into typed objects."""

from hf_distill.recipes.keys import keys
from hf_distill.recipes.reading import dump_recipe, load_recipe, parse_recipe
from hf_distill.recipes.schema import Recipe
from hf_distill.recipes.sections import StudentSection, TeacherSection
from hf_distill.recipes.train_sections import (
    AdapterSection,
    PretrainSection,
    TrainSection,
    arguments,
)

__all__ = [
    "AdapterSection",
    "PretrainSection",
    "Recipe",
    "StudentSection",
    "TeacherSection",
    "TrainSection",
    "arguments",
    "dump_recipe",
    "keys",
    "load_recipe",
    "parse_recipe",
]
