"""Lookahead that swaps as the optimizers of this package do."""

import pytorch_optimizer


class SwappedLookahead(pytorch_optimizer.Lookahead):
    """Lookahead with `eval` and `train`; the slow weights are the model that it returns."""

    swapped = False

    def eval(self) -> None:
        """Put the slow weights into the parameters."""
        if not self.swapped:
            self.backup_and_load_cache()
            self.swapped = True

    def train(self) -> None:
        """Put the fast weights back."""
        if self.swapped:
            self.clear_and_load_backup()
            self.swapped = False
