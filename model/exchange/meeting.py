"""How two processes tell each other something before they have a link: through the store that both have."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import Store

from model.errors import PeerError, reason


def swapped(store: Store, tower: int, key: str, mine: str, timeout_s: float, about: str = "") -> str:
    """Give `mine` to the other tower under `key` and return its own; PeerError if that does not come in time.

    `about` is what a person would call it; by default the key.
    """
    try:
        store.set(f"{key}/{tower}", mine)
        store.wait([f"{key}/{1 - tower}"], timedelta(seconds=timeout_s))
        return store.get(f"{key}/{1 - tower}").decode()
    except RuntimeError as error:
        raise PeerError(f"the other tower died, or said nothing for {timeout_s:g} s (waiting for {about or key}: "
                        f"{reason(error)})") from None
