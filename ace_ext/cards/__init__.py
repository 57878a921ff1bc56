"""The model card of a pruned folder, ``README.md``, written from the run's report. Hubs show it with the model.

May import ``pruning``, ``packed``, ``data``, ``models`` and what lies below them.
"""

from ace_ext.cards.card import BASE_CARD, CARD, card_says, mask_words, write_card

__all__ = ["BASE_CARD", "CARD", "card_says", "mask_words", "write_card"]
