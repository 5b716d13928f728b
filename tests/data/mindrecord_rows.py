"""Rows that this project and MindSpore write alike; run by MindSpore's Python, too, so it imports nothing else."""

import numpy as np

CASES = {
    # file -> fields: of several BLOB pages; of several RAW pages and a lone field; of all types.
    "scimind.mindrecord": {"input_ids": "int32", "labels": "int32", "molecular_mask": "float32"},
    "lone.mindrecord": {"input_ids": "int32"},
    "types.mindrecord": {"b": "float64", "a": "int64", "c": "float32"},
}
PAGE_SIZE, HEADER_SIZE = 1 << 15, 1 << 14


def rows(name):
    if name == "scimind.mindrecord":
        for number in range(120):
            ids = (np.arange(3 + number % 97, dtype=np.int64) ** 2 * 7919 * (number + 1) % 32100).astype(np.int32)
            labels = np.where(np.arange(len(ids)) % 5 < 2, -100, ids).astype(np.int32)
            yield {"input_ids": ids, "labels": labels, "molecular_mask": (ids >= 32000).astype(np.float32)}
    elif name == "lone.mindrecord":
        for number in range(5200):
            yield {"input_ids": np.arange(number % 3 + 1, dtype=np.int32)}
    else:
        borders = [sign * (1 << bits) + more for bits in (7, 15, 31) for sign in (1, -1) for more in (-1, 0)]
        wide = np.array([*borders, (1 << 63) - 1, -(1 << 63), 0], np.int64)
        yield {"a": wide, "b": np.array([1.5, -0.0]), "c": np.zeros(0, np.float32)}
        yield {"a": np.zeros(0, np.int64), "b": np.array([np.pi]), "c": np.arange(5, dtype=np.float32) / 7}
