"""Other people's formats: each is read into, and written from, a source of leaves."""
