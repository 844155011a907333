"""LlamaGen, class to image (arXiv 2406.06525): the model of the table in the CCA paper."""
