"""A base from raw text: cleaning, tokenizer, packed shards, training, instruction stage, report."""
