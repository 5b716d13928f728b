"""Self-Instruct (Wang et al. 2023), as Alpaca does it: a model writes instructions after examples; what is new is kept.

tasks (seed tasks in, prompt out, reply parsed) ─ filters (rules, likeness) ─ rounds (the job) ─ endpoint, replies;
verbs (the diversity figure) ─ report.
"""
