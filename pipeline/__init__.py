"""From published archives to batches of pixels.

sources/ -> preprocess -> shards + manifest -> batches -> loader (DALI)
"""
