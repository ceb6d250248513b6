"""What a run leaves on the disk: its folder and lock, checkpoints, the model, the best one, and what a crash left."""
