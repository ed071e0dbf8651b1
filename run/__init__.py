"""What surrounds a run: its folder, several processes, SLURM, sweeps, the range test, what the terminal shows."""
