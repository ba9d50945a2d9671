"""Text -> IndexedDataset, and a look into one. No torch.

1. `inputs` finds files; `readers` gives their documents.
2. `preprocess` tokenizes them, on all cores (`workers`), into datasets; `pairs` makes records of
   functions for it.
3. `inspect` counts and decodes what is in a dataset; `verify` reads every byte of it.
"""
