"""Names of adapters: people give them to files, read them in lists, and type them."""

from __future__ import annotations

# What parts a path or a list, or has a meaning to a shell or another file system.
_APART = "/\\:;,|<>*?\"'`$"


def why_no_name(name: str) -> str:
    """Why a text is no name of an adapter; "" if it is one: letters of any script, digits, spaces inside, `._-()+=@`.

    What does not print is refused: control characters, bytes that are no text, marks that turn the direction of text.
    """
    if not name.strip():
        return "it is empty"
    if not name.isprintable():
        return "it has characters that don't print"
    if found := [one for one in _APART if one in name]:
        return f"it has {' '.join(found)}"
    if name[0] in ".-" or name != name.strip():
        return "it begins with a dot or a dash, or a space is at an end"
    return ""
