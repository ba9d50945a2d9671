"""One small interface over SentencePiece, tokenizers and tiktoken.

1. `tokenizer.load_tokenizer` opens what a recipe's `tokenizer:` names, through `vocabularies`.
2. `fast` tokenizes large corpora with gigatoken; `fast_description` tells for which tokenizers its
   ids are the same.
3. `chat` renders conversations by chat templates and finds the answers in them.
4. `training` makes a SentencePiece model from documents, or the tokenizer of bytes.
"""
