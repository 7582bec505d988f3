"""Real Megatron-Core on this machine's processor: its models, optimizers, saves and loads, over gloo."""
