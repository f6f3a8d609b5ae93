"""Special tokens, tokenizer files, and batches of shorter texts."""
