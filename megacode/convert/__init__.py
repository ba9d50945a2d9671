"""Checkpoint <-> Hugging Face.

1. `families` has a file for each: which models fit (`family`), the config both ways
   (`config_keys`), names and layout of weights (`layout`).
2. Out: `export` reads a checkpoint (`checkpoint_reader`) and writes weights (`safetensors_files`),
   tokenizer files (`tokenizer_files`, `kept`, `templates`) and the model card (`card`);
   `revisions` does so for every checkpoint of a run.
3. In: `importing` -> `checkpoint_writer`; `origin` does so for a run that starts from a folder.
4. `average` reads checkpoints of a run and writes their mean as one.
"""
