"""Recipes: settings of a published work under one name. They lie between the defaults and what a user gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple


class Recipe(NamedTuple):
    """settings: option -> value. source: where they are published."""

    settings: dict[str, Any]
    source: str


class WithRecipes:
    """A group of options one of which names a recipe for others of the group."""

    recipe_option: ClassVar[str]
    recipes: ClassVar[Mapping[str, Recipe]]

    @classmethod
    def of_recipe(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the recipe that is named among the options `given`, without those that are given themselves."""
        recipe = cls.recipes.get(given.get(cls.recipe_option, ""))
        return {} if recipe is None else {name: v for name, v in recipe.settings.items() if name not in given}
