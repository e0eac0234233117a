"""Check a recipe before it runs, as llm-compressor drops what it does not know."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from llmcompressor.recipe import Recipe
from pydantic import ValidationError

from llmc_attnmask.oneshot.shipped import recipes

_BYTES = 1 << 20  # largest recipe: a megabyte of YAML takes seconds
_NODES = 10_000  # most values in a recipe, with its aliases expanded
_NUMBERED = re.compile(r"_stage_(\d+)\Z")
_SHAPE = """expected this shape:

prune_stage:
  attention_modifiers:
    AttentionMatrixPruningModifier:
      sparsity: 0.5
      mask_structure: "2:4\""""


class RecipeError(ValueError):
    """A recipe would not do what it says; the message says where."""


class _Loader(yaml.SafeLoader):
    """Refuses what cannot be a recipe before it takes more memory than its file."""

    def compose_document(self) -> yaml.Node | None:
        node = super().compose_document()
        if node is not None and _nodes(node, {}) > _NODES:
            raise yaml.constructor.ConstructorError(
                problem=f"it has more than {_NODES} values, with aliases expanded",
                problem_mark=node.start_mark,
            )
        return node


def _nodes(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Return how many values a node stands for when its aliases are expanded."""
    if node in known:
        if not known[node]:
            raise yaml.constructor.ConstructorError(
                problem="it contains itself", problem_mark=node.start_mark
            )
        return known[node]
    known[node] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    known[node] = 1 + sum(_nodes(child, known) for child in children)
    return known[node]


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    """Refuse a key that appears twice in one mapping, of which YAML keeps the last."""
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            continue  # refused below
        if key in seen:
            raise yaml.constructor.ConstructorError(
                problem=f"{key!r} appears twice in one mapping, and only the last "
                "would count",
                problem_mark=node.start_mark,
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe and create its modifiers.

    :param path: a file, or the name of a recipe that the package ships
    :raises RecipeError: for a file that is not a YAML mapping, keys that llm-compressor
        silently ignores, unknown modifiers and wrong fields
    """
    path = find_recipe(path)
    content = read_recipe(path)
    try:
        recipe = Recipe.from_dict(content)
    except ValidationError as error:
        raise RecipeError(f"recipe {path}: {_described(error)}") from None
    except ValueError as error:
        raise RecipeError(f"recipe {path}: {error}") from None
    except Exception as error:  # stock modifiers check their fields in many ways
        raise RecipeError(
            f"recipe {path} has fields that a modifier cannot take: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not recipe.modifiers:
        raise RecipeError(f"recipe {path} names no modifier; {_SHAPE}")
    return recipe


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe: stage -> group -> modifier -> its fields.

    :raises RecipeError: for a file that is not such a mapping
    """
    content = _read(path)
    if isinstance(content, dict):
        content = _with_stages(path, content)
    _check_shape(path, content)
    return content


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe.

    :param recipe: a file, or the name of a recipe that the package ships
    :raises RecipeError: if there is none; the message lists the shipped recipes
    """
    if Path(recipe).is_file():
        return Path(recipe)
    shipped = recipes()
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    raise RecipeError(
        f"recipe {recipe} does not exist; expected a file, or the name of a shipped "
        f"recipe: {', '.join(shipped)}"
    )


def _with_stages(path: Path, content: dict[Any, Any]) -> dict[Any, Any]:
    """Return the content with stages named so that llm-compressor reads them.

    The recipe.yaml that it writes after a second run has numbered stages, such as
    ``default_stage_0``, which its own reader drops.
    """
    renamed = {_NUMBERED.sub(r"_\1_stage", str(k)): v for k, v in content.items()}
    if len(renamed) < len(content):
        raise RecipeError(f"recipe {path} has two stages with the same name")
    return renamed


def _read(path: Path) -> Any:
    if (size := path.stat().st_size) > _BYTES:
        raise RecipeError(f"recipe {path} has {size} bytes; expected at most {_BYTES}")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not YAML: {error}") from None
    except OSError:
        raise
    except RecursionError:
        raise RecipeError(f"recipe {path} is nested too deeply") from None
    except Exception as error:  # PyYAML raises any kind if a scalar does not fit
        raise RecipeError(
            f"recipe {path} has a value that does not fit its tag: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_shape(path: Path, content: object) -> None:
    if not isinstance(content, dict) or not content:
        raise RecipeError(
            f"recipe {path} is not a mapping: its type is {type(content).__name__}; "
            f"{_SHAPE}"
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


def _reject(path: Path, place: str, expected: str) -> None:
    raise RecipeError(
        f"recipe {path}: llm-compressor would silently drop {place}, which is not "
        f"{expected}; {_SHAPE}"
    )


def _described(error: ValidationError) -> str:
    """Return one line per wrong field: modifier, field, what is wrong."""
    lines = []
    for problem in error.errors(include_url=False):
        field = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown field"
        lines.append(f"{error.title}{'.' + field if field else ''}: {message}")
    return "; ".join(lines)
