"""What a run minimises: one file per objective, all behind the protocol in `objective.py`."""
