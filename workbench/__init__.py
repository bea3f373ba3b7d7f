"""Edit facts into a causal language model, fine-tune it, and see whether the edits survive."""
