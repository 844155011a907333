"""Token shards, pairing and batches: a global batch is a pure function of (data, seed, step)."""

# What data.path and others mean by this word: scikit-learn's scans, see :mod:`megatron_cca.data.digits`.
DIGITS = "digits"
