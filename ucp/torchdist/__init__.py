"""torch.distributed's side: DTensors, state dicts, optimizers, DCP's storage, and the public save and load."""
