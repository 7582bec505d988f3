"""The training job: its ranks and how they agree, timings, random number generators, the order of the data."""
