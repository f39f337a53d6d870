"""Multi-fidelity neural architecture search with knowledge distillation.

Three groups of rooms. The core (`trial`, `space`, `spaces`, `config`, `tasks`, `run_folder`, `stop_files`) holds the
words that everything shares. The driver (`search`, `fleet`, `report`, `commands`, `doctor`) never imports torch. The
worker (`data`, `training`, `export`, `selftest`) never imports the driver. `networks` holds the torch modules that
spaces build.
"""

__version__ = "0.2.0"
