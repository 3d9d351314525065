"""From a source to shards: index -> plan (which image goes into which shard) -> chunks in workers -> shards, receipts
-> manifest."""
