"""One HTML page of a run, which needs no network and no other file."""
