"""The matrix of ablations: runs -> their errors -> table and picture."""
