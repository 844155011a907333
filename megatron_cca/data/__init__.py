"""Token shards, pairing and batches: a global batch is a pure function of (data, seed, step)."""
