"""What each training script learns: its networks, its losses and the scores of its validation."""
