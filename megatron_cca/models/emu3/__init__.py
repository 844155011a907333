"""Emu3 (arXiv 2409.18869): text and images in one vocabulary, one decoder."""
