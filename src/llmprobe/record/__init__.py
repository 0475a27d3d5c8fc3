"""What runs inside the engine's processes: stamp events and append fixed-size records, nothing else."""
