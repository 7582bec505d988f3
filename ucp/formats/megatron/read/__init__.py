"""Reading Megatron-Core's checkpoints."""
