"""Writing Megatron-Core's checkpoints."""
