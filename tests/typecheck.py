"""The run-time type checker of the test run: an int is a float, as PEP 484 has it.

jaxtyping's import hook decorates every function and dataclass of lorascope with `jaxtyped`, which
binds the arguments of each call to compare the shapes of arrays. That would take a fifth of the
test run, so what has no shape to compare is checked by beartype alone.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, jaxtyped

check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def jaxtyped_if_needed(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return the decorator of a function or a class: `jaxtyped`, or `typechecker` alone."""

    def decorate(it: Any) -> Any:
        if not inspect.isclass(it):
            return checked(it)
        if dataclasses.is_dataclass(it):
            it.__init__ = checked(it.__init__)
        return it

    def checked(function: Any) -> Any:
        hints = inspect.get_annotations(function).values()
        if inspect.isgeneratorfunction(function) or any(map(_has_shape, hints)):
            return jaxtyped(function, typechecker=typechecker)
        return typechecker(function)

    return decorate


def _has_shape(hint: Any) -> bool:
    """Return whether a hint has the shape of an array, or is a name that could stand for one."""
    if isinstance(hint, str) or (inspect.isclass(hint) and issubclass(hint, AbstractArray)):
        return True
    return any(map(_has_shape, hint if isinstance(hint, list) else get_args(hint)))


jaxtyping.jaxtyped = jaxtyped_if_needed  # the hook looks it up for each function
