"""From what `--data` names to batches: arrays and folders, subsets, augmentation, loaders."""
