"""What the library asks of Lightning's Trainer: strategies, checks, run folders, signals."""
