"""Sampling bytes from a model: one prefill, then one byte at a time with the layers' cache."""

import codecs

import torch

from .data import SEPARATOR


def generate(model, prompt, tokens, temperature=0.8, top_p=1.0, seed=0):
    """Yields `tokens` byte values that continue the prompt.

    The prompt goes through the chunk kernel at once; afterwards each byte costs one recurrent step
    on the layers' states, whatever the length so far.

    Args:
        model: GatedDeltaLM; left in evaluation mode.
        prompt: bytes; a separator is put before it, as before each file of the corpus.
        temperature: 0 takes the most likely byte.
        top_p: draw only from the most likely bytes that together have this probability.
        seed: of the draws; the global RNG is not used.
    """
    model.eval()
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    cache = model.new_cache()
    tokens_in = torch.tensor([list(SEPARATOR + prompt)], device=device)
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(tokens_in, cache)[0, -1].float().cpu()
        token = choose(logits, temperature, top_p, generator)
        yield token
        tokens_in = torch.tensor([[token]], device=device)


def choose(logits, temperature, top_p, generator):
    """One token of logits [vocabulary]."""
    if temperature == 0:
        return logits.argmax().item()
    # float64: low temperatures must not overflow, and the sums are those of the sorted order
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    # the first one always stays; another one does while those before it have less than top_p
    ordered[1:][ordered.cumsum(0)[:-1] >= top_p] = 0
    return tokens[torch.multinomial(ordered, 1, generator=generator)].item()


def as_text(values):
    """Pieces of text of a stream of byte values, as soon as they are complete UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for value in values:
        if piece := decoder.decode(bytes([value])):
            yield piece.replace("\0", "\n")
    if rest := decoder.decode(b"", final=True):
        yield rest
