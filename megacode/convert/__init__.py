"""Checkpoint <-> Hugging Face.

1. `families` has a file for each: which models fit (`family`), the config both ways, names and layout of weights (`layout`).
2. Out: `checkpoint_reader` -> `export` -> `safetensors_files`; `tokenizer_files` and `kept` add what else belongs to a model;
   `complete_export` puts it together, `revisions` does so for every checkpoint of a run.
3. In: `importing` -> `checkpoint_writer`.
"""
