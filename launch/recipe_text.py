"""A recipe's values as people read them."""

from __future__ import annotations


def shown(value) -> str:
    """Return a value of `Recipe.to_dict` in a few words."""
    if isinstance(value, dict):
        rest = ", ".join(f"{key} {shown(one)}" for key, one in value.items() if key != "kind")
        return f"{value['kind']}: {rest}" if "kind" in value else rest
    if isinstance(value, list):
        same = len(value) > 2 and len(set(value)) == 1
        return f"{shown(value[0])} each" if same else " ".join(map(shown, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
