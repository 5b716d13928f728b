"""Data for information extraction: records of entities, relations and events to instructions, and answers back."""
