"""What is done to the stored images of a batch, in this order (recipes `notes` and `paper`): decode, cut the crop,
subtract the mean image's part at the crop's own offset, add the colour shift, flip, multiply by `scale`.

`on_gpu` has DALI do all of it, `on_cpu` has DALI decode and cut, and `finish` do the rest. Nothing is drawn at random
here: pipeline.batches has said everything.
"""
