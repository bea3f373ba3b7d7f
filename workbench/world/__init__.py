"""The embedded default: real facts, generated text and two small models that learnt them."""
