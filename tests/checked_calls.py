"""Objects that answer only to names that a class of a real binding has, and check calls against its docstrings."""

import re


class Signature:
    """The overloads that the docstring of a bound function names."""

    def __init__(self, name, doc):
        self.name = name
        self.overloads = []
        for line in (doc or "").splitlines():
            if found := re.match(rf"\s*(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", line):
                self.overloads.append([_parameter(one) for one in _split(found[1]) if not one.startswith("self")])

    def check(self, trt, args, kwargs):
        if not self.overloads:
            raise AssertionError(f"{self.name} has no signature in its docstring")
        problems = [self._problem(trt, parameters, args, kwargs) for parameters in self.overloads]
        if all(problems):
            raise AssertionError(f"{self.name}{args}{kwargs}: {problems}; the real one takes {self.overloads}")

    def _problem(self, trt, parameters, args, kwargs):
        if len(args) > len(parameters):
            return f"{len(args)} arguments"
        names = [name for name, _, _ in parameters]
        if unknown := set(kwargs) - set(names[len(args) :]):
            return f"unknown {unknown}"
        given = dict(zip(names, args, strict=False)) | kwargs
        for name, kind, optional in parameters:
            if name not in given:
                if not optional:
                    return f"{name} is missing"
            elif not _fits(trt, kind, given[name]):
                return f"{name}={given[name]!r} is no {kind}"
        return ""


def _split(text):
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += letter in "[(<"
        depth -= letter in "])>" and text[position - 1] != "-"
        if letter == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [part for part in [*parts, text[start:].strip()] if part]


def _parameter(text):
    name, _, rest = text.partition(":")
    kind, equals, _ = rest.partition("=")
    return name.strip(), kind.strip(), bool(equals)


def _fits(trt, kind, value):
    simple = kind.rsplit(".", 1)[-1]
    if "Union" in kind or "object" in kind or "Callable" in kind or "Optional" in kind:
        return True
    if "int" in simple.lower() and simple.lower().startswith(("int", "typing.supportsint", "supportsint")):
        return isinstance(value, int) or hasattr(value, "__index__")
    if simple == "bool":
        return isinstance(value, bool)
    if simple == "str":
        return isinstance(value, str)
    if simple.lower() == "buffer":
        return isinstance(value, (bytes, bytearray, memoryview))
    if simple in ("Dims", "tuple"):
        return isinstance(value, tuple) and all(isinstance(size, int) for size in value)
    if simple == "list":
        return isinstance(value, list)
    real = getattr(trt, simple, None)
    if isinstance(real, type):
        return isinstance(value, real) or (isinstance(value, Checked) and issubclass(value._real, real))
    raise AssertionError(f"no check for a parameter of type {kind}")


class Checked:
    """An object that has what its real class has, and does what a double does."""

    def __init__(self, trt, real, double, calls):
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_double", double)
        object.__setattr__(self, "_trt", trt)
        object.__setattr__(self, "_calls", calls)

    def __getattr__(self, name):
        if not hasattr(self._real, name):
            raise AttributeError(f"{self._real.__name__} of {self._trt.__version__} has no {name!r}")
        self._calls.add(f"{self._real.__name__}.{name}")
        if isinstance(getattr(self._real, name), property):
            return getattr(self._double, name)
        signature = Signature(name, getattr(self._real, name).__doc__)

        def call(*args, **kwargs):
            signature.check(self._trt, args, kwargs)
            return getattr(self._double, name)(*args, **kwargs)

        return call

    def __setattr__(self, name, value):
        member = getattr(self._real, name, None)
        if not isinstance(member, property) or member.fset is None:
            raise AttributeError(f"{self._real.__name__} of {self._trt.__version__} has no {name!r} to set")
        self._calls.add(f"{self._real.__name__}.{name}")
        setattr(self._double, name, value)
