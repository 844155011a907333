"""LlamaGen, class to image (arXiv 2406.06525): the model that the CCA paper's own table was made with."""
