"""A corpus -> Megatron-Core IndexedDatasets, on all cores and machines, resumable, the same bytes
everywhere.

1. `request.py` says what is asked for and what comes back; `checks.py` finds mistakes in it,
   `existing.py` what was made before. `run.py` has the order of the steps; `folder.py` holds the
   folder of parts against other runs.
2. `splitting.py` cuts the input files into parts by their sizes alone.
3. Workers tokenize parts: `tokenize.py`, with `conditions.py` for `--where`, `quarantine.py` for
   bad records, `counts.py` for what was read and written, `finished_parts.py` for the files of a
   part.
4. `order.py` gives blocks of documents in order: as read, without duplicates, shuffled, or a
   repository's files together.
5. Workers copy the blocks into shards: `shards.py`. `manifest.py` says what they are. Then the
   parts go.
"""

from megacode.corpus.preprocess.request import Request, Result
from megacode.corpus.preprocess.run import preprocess

__all__ = ["Request", "Result", "preprocess"]
