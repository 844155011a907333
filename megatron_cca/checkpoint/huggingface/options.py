"""Command-line options by which messages name what a user gave; the library's arguments are called alike."""

HF, CHECKPOINT, HF_TEMPLATE, FORMAT = "--hf", "--checkpoint", "--hf-template", "--format"
