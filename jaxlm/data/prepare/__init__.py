"""Preparing data of any size: stages that take a shard and give a shard.

`pipeline` knows the steps and their order, `work` how a step's tasks are done and kept, `engines` who does them. A
stage itself (`filter.filter_documents`, `split.split_documents`) is a pure function: documents in, documents and counts
out.
"""
