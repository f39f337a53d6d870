"""Multi-fidelity neural architecture search with knowledge distillation.

Two halves that meet in the words (`trial`, `space`, `config`, `orders`): the brain (`search`, `fleet`, `report`,
`commands`, `doctor`) never imports torch; the muscle (`data`, `training`, `networks`, `export`, `selftest`) never
imports the brain.
"""

__version__ = "0.1.0"
