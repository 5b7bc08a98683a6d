"""A small policy from scratch: its tokenizer, and supervision by demonstrations."""
