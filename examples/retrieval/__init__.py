"""The parts of train_retrieval.py: images, batches, networks, losses, the run's folder and its pictures."""
