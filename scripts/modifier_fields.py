"""griffe extension that shows a Pydantic class's fields as its signature's parameters.

Pydantic makes ``__init__`` when a class is created, but the API page is made from
sources without running them.
"""

from typing import Any

from griffe import (
    Class,
    Expr,
    ExprCall,
    ExprKeyword,
    ExprLambda,
    Extension,
    Function,
    Parameter,
    ParameterKind,
    Parameters,
)


class ModifierFields(Extension):
    """Gives every class named ``...Modifier`` an ``__init__`` made of its fields."""

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        if not cls.name.endswith("Modifier") or "__init__" in cls.members:
            return
        parameters = [
            Parameter(
                name,
                annotation=attribute.annotation,
                kind=ParameterKind.keyword_only,
                default=_default(attribute.value),
            )
            for name, attribute in cls.attributes.items()
            if attribute.annotation and not name.startswith("_")
        ]
        init = Function("__init__", parameters=Parameters(*parameters))
        cls.set_member("__init__", init)


def _default(value: str | Expr | None) -> str | Expr | None:
    """Return the default in ``Field(...)``; any other value is the default itself."""
    if not isinstance(value, ExprCall) or str(value.function) != "Field":
        return value
    given = {x.name: x.value for x in value.arguments if isinstance(x, ExprKeyword)}
    if "default" in given:
        return given["default"]
    factory = given.get("default_factory")
    if isinstance(factory, ExprLambda):
        return factory.body
    return f"{factory}()" if factory else None
