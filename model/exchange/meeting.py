"""How two processes tell each other something before they have a link: through the store that both have."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import Store

from model.errors import PeerError, reason


def swapped(store: Store, tower: int, key: str, mine: str, timeout_s: float) -> str:
    """Give `mine` to the other tower under `key` and return its own; PeerError if that does not come in time."""
    store.set(f"{key}/{tower}", mine)
    try:
        store.wait([f"{key}/{1 - tower}"], timedelta(seconds=timeout_s))
        return store.get(f"{key}/{1 - tower}").decode()
    except RuntimeError as error:
        raise PeerError(f"no connection to the other tower: it died, or said nothing for {timeout_s:g} s (waiting for "
                        f"{key}: {reason(error)})") from None
