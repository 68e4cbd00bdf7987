"""Training: teachers by matching, one-step students by distillation, and everything a run writes to disk."""
