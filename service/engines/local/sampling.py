"""Picks the next token of one request."""

from __future__ import annotations

import torch
from torch import Tensor

from service.engines.base import EngineError, Sampling


class Sampler:
    """One request's choices: the same seed picks the same tokens, whoever else is in the batch. V: the vocabulary."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**63)

    def pick(self, logits_V: Tensor) -> int:
        """The next token. Raises EngineError for logits that are no numbers."""
        logits_V = logits_V.float()
        # argmax, not max: on a tie the first, as in generate.
        best = logits_V.argmax()
        if not logits_V[best].isfinite():
            raise EngineError("the expert's logits are not finite")
        if self._temperature == 0:
            return int(best)
        # The best first goes to 0: a tiny temperature then divides into -inf, never into NaN.
        probabilities_V = ((logits_V - logits_V[best]) / self._temperature).softmax(-1)
        if self._top_p >= 1:
            return int(torch.multinomial(probabilities_V, 1, generator=self._generator))
        sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
        beyond_V = sorted_V.cumsum(-1) - sorted_V >= self._top_p
        beyond_V[0] = False  # the best token stays, at any top_p
        return int(order_V[torch.multinomial(sorted_V.masked_fill(beyond_V, 0), 1, generator=self._generator)])
