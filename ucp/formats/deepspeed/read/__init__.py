"""Reading DeepSpeed's files: each model-parallel rank's, put together as one model."""
