"""Live training state as a target: a checkpoint of any layout into a training process, all of it or nothing."""
