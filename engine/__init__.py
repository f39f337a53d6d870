"""Multi-fidelity neural architecture search with knowledge distillation.

Two halves that meet in `trial`, `space` and `config`: the brain (journal, policy, search, replay) never imports
torch; the muscle (data, loader, teacher, train, evaluate) never imports the journal or the policy.
"""

__version__ = "0.1.0"
