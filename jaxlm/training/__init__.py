"""Training: what is minimised, the step, the loop in phases, checkpoints and reports."""
