"""The training job: its ranks and how they agree, timings, random generators, the order of the data."""
