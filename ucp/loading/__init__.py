"""Live training state as a target: load a checkpoint of any layout into a training process, all of it or nothing."""
