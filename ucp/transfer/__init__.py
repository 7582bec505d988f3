"""Moving elements from a checkpoint's fragments to wherever a target wants them."""
