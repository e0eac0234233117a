"""Check a recipe before anything runs: llm-compressor drops what it does not know."""

from pathlib import Path

import yaml
from llmcompressor.recipe import Recipe
from pydantic import ValidationError

_SHAPE = """expected this shape:

prune_stage:
  attention_modifiers:
    AttentionMatrixPruningModifier:
      sparsity: 0.5
      mask_structure: "2:4\""""


class RecipeError(ValueError):
    """A recipe would not do what it says; the message names the place."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, where YAML keeps the last."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
        raise yaml.constructor.ConstructorError(
            problem=f"{twice[0]!r} stands twice in one mapping, and only the last "
            "would count",
            problem_mark=node.start_mark,
        )
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_UniqueKeyLoader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping
)


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe and create its modifiers.

    :raises RecipeError: for a file that is no YAML mapping, keys that llm-compressor
        silently ignores, unknown modifiers and wrong fields
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"recipe {path} does not exist")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not YAML: {error}") from None
    _check_shape(path, content)
    try:
        recipe = Recipe.from_dict(content)
    except ValidationError as error:
        raise RecipeError(f"recipe {path}: {_described(error)}") from None
    except ValueError as error:
        raise RecipeError(f"recipe {path}: {error}") from None
    if not recipe.modifiers:
        raise RecipeError(f"recipe {path} names no modifier; {_SHAPE}")
    return recipe


def _check_shape(path: Path, content: object) -> None:
    if not isinstance(content, dict) or not content:
        raise RecipeError(
            f"recipe {path} is not a mapping but {type(content).__name__}; {_SHAPE}"
        )
    for stage, groups in content.items():
        if stage == "args":
            continue
        if not str(stage).endswith("_stage") or not isinstance(groups, dict):
            _reject(path, f"{stage!r}", "a key ending in `_stage` over a mapping")
        for group, modifiers in groups.items():
            place = f"{stage}.{group}"
            if not str(group).endswith("_modifiers") or not isinstance(modifiers, dict):
                _reject(
                    path, repr(place), "a key ending in `_modifiers` over a mapping"
                )
            for name, fields in modifiers.items():
                if not isinstance(fields, dict):
                    _reject(path, repr(f"{place}.{name}"), "a modifier over its fields")


def _reject(path: Path, place: str, wanted: str) -> None:
    raise RecipeError(
        f"recipe {path}: llm-compressor would silently drop {place}, which is not "
        f"{wanted}; {_SHAPE}"
    )


def _described(error: ValidationError) -> str:
    """One line per wrong field: modifier, field, what is wrong."""
    lines = []
    for problem in error.errors(include_url=False):
        field = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown field"
        lines.append(f"{error.title}{'.' + field if field else ''}: {message}")
    return "; ".join(lines)
