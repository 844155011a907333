"""Training: from a configuration to a fine-tuned checkpoint, through Megatron-Core's schedules."""
