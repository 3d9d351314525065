"""Pictures of a run, as the paper's figures have them."""
