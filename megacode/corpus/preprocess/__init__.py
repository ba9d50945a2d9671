"""A corpus -> Megatron-Core IndexedDatasets, on all cores and machines, resumable, the same bytes everywhere.

The path, one file a step:

    request.py     what is asked for, and what comes back; checks.py tells mistakes in it
    run.py         the order of the steps, and what was made before (existing.py); folder.py holds off other runs
    splitting.py   cut the input files into parts by their sizes alone
    tokenize.py    one part -> finished_parts.py (the work of a process), with quarantine.py for what is bad
    layout.py      parts laid end to end meanwhile
    order.py       duplicates, shuffling, repositories: which documents follow which
    assemble.py    parts -> shards of datasets; manifest.py says what they are
    fields.py      metadata of records, and conditions.py: which of them are wanted (`--where`)
    counts.py      what was read and written
"""

from megacode.corpus.preprocess.request import Request, Result
from megacode.corpus.preprocess.run import preprocess

__all__ = ["Request", "Result", "preprocess"]
