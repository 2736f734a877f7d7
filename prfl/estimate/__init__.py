"""What a run will cost and what it lacks, found out before it starts and without the model's weights."""
