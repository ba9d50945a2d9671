"""IndexedDataset -> batches: a pure function of (recipe, step). No torch but in `loader`.

1. `indexed` reads and writes Megatron-Core's format (`records` where documents are from); `source` joins shards to a source.
2. `planning.plan_with_data` counts what is there; `tokenizer_check` compares it with the recipe's tokenizer.
3. `permute`, packing (`best_fit`, `pack_index`) say which tokens sample n of a source is; `mixture` which samples a step has.
4. `fim` and its files rearrange documents; `batch` makes arrays; `loader` and `prefetch` bring them to a rank.
5. `trace` asks for any step again.
"""
