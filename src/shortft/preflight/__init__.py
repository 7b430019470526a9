"""What can be known before anything slow: places, memory, time, and what this machine can run."""
