"""IndexedDataset -> batches: a pure function of (recipe, step). No file here imports torch.

The path of a token:

1. `indexed` maps a corpus on disk (Megatron-Core's .bin and .idx); `source` joins shards to one
   token stream and reads any part of it.
2. `planning` counts the tokens and packs of every source, so that `plan` can say how many samples
   each step takes. `tokenizer_check` refuses corpora that another tokenizer made.
3. `mixture` says which samples a step has: `permute` shuffles windows of S + 1 tokens, or packs of
   whole documents (`best_fit` makes them, `pack_index` keeps them on disk).
4. `sample_reader` reads the tokens of these samples. `fim` rearranges documents within a sample,
   `fim_document` whole documents; `fim_near` encodes only what is near the cuts.
5. `batch` makes arrays: tokens, labels, loss mask, positions, and a digest.
6. `loader` gives a data-parallel rank its micro-batches, which `prefetch` prepares on a thread.

`trace` asks for any step again and names its documents, with the input files that `records` has.
`packing_report` says what packing loses, `lengths` makes histograms of documents.
"""
