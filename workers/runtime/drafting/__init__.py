"""What drafts on rank 0: a worker's drafter as its options name it, and the runner of an EAGLE-3 head."""
