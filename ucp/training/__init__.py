"""Live training state: what a training process holds, and how a checkpoint of any layout is put into it."""
