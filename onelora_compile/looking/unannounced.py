"""A subclass of a user's class of which the user's code hears nothing.

Classes that register their subclasses, or want keywords for them (`__init_subclass__`, a metaclass), are told of each
`class` statement and each call of `type`.  What is made here for a module is no class of the user's program: it must
be in no registry, and nobody could give it keywords.
"""

from __future__ import annotations

from typing import Any

from onelora_compile.looking.untouched import of_library


class Unannounced:
    """Stands before the user's classes, where Python asks for `__init_subclass__`.

    Without `__slots__`, with which an object could not change from its class to the subclass.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: the classes behind are not asked."""


def subclass(name: str, bases: tuple[Any, ...], namespace: dict[str, Any]) -> Any:
    """A class of these bases, of the metaclass of the last one, made without code of the user's.

    Args:
        name: of the class.
        bases: the last is the user's; the others have no metaclass.
        namespace: its attributes.
    """
    meta = type(bases[-1])
    first = () if issubclass(bases[-1], Unannounced) else (Unannounced,)  # once for all that is made of a class
    # ABCMeta keeps a table for each class that it makes; what stands before it in the metaclass is the user's.
    make: Any = next(one for one in meta.__mro__ if of_library(one.__module__))
    return make.__new__(meta, name, (*first, *bases), namespace)
