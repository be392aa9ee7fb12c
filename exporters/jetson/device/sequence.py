"""Whether a signed update is newer than those that this device took: its number only grows.

The number is of the bundle, not of an adapter's name: a file's name is not signed, and one adapter is in use at a time.
Going back by `rollback` or `use` leaves it as it is.
"""

from __future__ import annotations

import hashlib

from .folder import BundleError, Folder

_AGAIN = "to send it all the same, sign it again: `onelora sign` gives it the next number"


def taken_before(folder: Folder, path: str, content: bytes, sequence: int | None) -> bool:
    """Refuse an update whose signature is older than the newest that was taken.

    Args:
        folder: the bundle; without a key it takes everything.
        path: where the content came from, for messages.
        content: the adapter file.
        sequence: the number that was signed with it.

    Returns:
        Whether it is that newest one, which was taken and has been in use: there is nothing to do then.

    Raises:
        BundleError: it has no number, a smaller one, or that of another file.
    """
    newest = folder.state()["taken"] if folder.manifest.get("update_key") else None
    if newest is None:
        return False
    last = newest["sequence"]
    if sequence is None:
        raise BundleError(f"{path} is signed without a sequence number, and this device has taken {last}: {_AGAIN}")
    if sequence < last:
        raise BundleError(
            f"{path} is older than what was taken here: its sequence number is {sequence}, and {last} was taken. "
            f"`rollback` and `use` go back to what is here; {_AGAIN}"
        )
    same = hashlib.sha256(content).hexdigest() == newest["sha256"]
    if sequence == last and not same:
        raise BundleError(f"{path} has the sequence number {last} of another file, which was taken: {_AGAIN}")
    # Where the state was lost, the newest one that is kept is no longer in use: it may come again.
    return sequence == last and folder.has_state
