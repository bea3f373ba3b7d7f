"""Fine-tuning: tasks, plans of which weights may move, and the loop itself, which is
transformers.Trainer.
"""
