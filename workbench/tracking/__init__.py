"""What a model believes: retention of facts, the logit lens, mass by category of token."""
