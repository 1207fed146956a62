"""Text generation with a causal language model: greedy, or sampling with temperature, top-k and top-p."""

import torch
from torch import Tensor

from data2vec_train.weights.base import PretrainedModel


@torch.no_grad()
def generate(
    model: PretrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue prompts (B, T) int64 to (B, T'); rows that have ended are filled with padding.

    Positions count real tokens, as in the forward pass. transformers counts them from 0 in `generate` and from
    `pad_token_id` + 1 in the forward pass, so that the two disagree (TRANSFORMERS.md, fault 2); `config.hf_compat`
    does the same.

    Args:
        model: a `Data2VecTextForCausalLM` that is a decoder.
        input_ids: prompts; shorter ones are padded on the left.
        attention_mask: (B, T), 1 = real; None = everything that is not padding.
        max_new_tokens: largest number of new tokens; default 20.
        max_length: largest length of prompt and new tokens together, instead of `max_new_tokens`.
        do_sample: draw tokens; else take the likeliest.
        temperature: divides logits; below 1 = likely tokens become likelier.
        top_k: draw among the k likeliest.
        top_p: draw among the likeliest that together have this probability.
        eos_token_id: ends a row; None = the config's, -1 = never.
        pad_token_id: fills rows that have ended; None = the config's.
        use_cache: keep keys and values of earlier tokens, instead of computing them again for every token.
        generator: of random numbers, None = torch's own.

    Raises:
        ValueError: a model that is not a decoder, settings out of range, a prompt with padding on the right, or no
            room for a single token.
    """
    _check(temperature, top_k, top_p, max_new_tokens, max_length)
    config = model.config
    if not config.is_decoder:
        raise ValueError("the model is not a decoder, so that tokens see later ones; load it with is_decoder=True")
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    end = config.eos_token_id if eos_token_id is None else eos_token_id
    mask = (input_ids != config.pad_token_id) if attention_mask is None else attention_mask.bool()
    if not bool(mask[:, -1].all()):
        raise ValueError("a prompt ends in padding; pad prompts on the left")
    num_new = 20 if max_new_tokens is None else max_new_tokens
    num_new = num_new if max_length is None else max_length - input_ids.shape[1]
    room = model.get_encoder().max_tokens - input_ids.shape[1]
    if min(num_new, room) < 1:
        raise ValueError(
            f"a prompt of {input_ids.shape[1]} tokens leaves no room: the model has positions for "
            f"{model.get_encoder().max_tokens}, and max_new_tokens={max_new_tokens}, max_length={max_length}"
        )
    was_training = model.training
    model.eval()
    first_position = 0 if config.hf_compat else model.get_encoder().embedder.pad_id + 1
    cache, fed = None, input_ids
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for _ in range(min(num_new, room)):
        counted = mask.cumsum(dim=1) - 1 + first_position
        # Padding has the padding row of the table of positions, or 1 in transformers.
        before = 1 if config.hf_compat else model.get_encoder().embedder.pad_id
        positions = torch.where(mask, counted, before)[:, -fed.shape[1] :]
        output = model(
            fed,
            mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=use_cache,
            logits_to_keep=1,
            return_dict=True,
        )
        following = _choose(output.logits[:, -1].float(), do_sample, temperature, top_k, top_p, generator)
        following = torch.where(ended, pad, following)
        input_ids = torch.cat([input_ids, following[:, None]], dim=1)
        mask = torch.cat([mask, ~ended[:, None]], dim=1)
        ended = ended | (following == end)
        if bool(ended.all()):
            break
        cache = output.past_key_values
        fed = following[:, None] if cache is not None else input_ids
    model.train(was_training)
    return input_ids


def _choose(
    logits: Tensor,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Logits (B, V) -> ids (B,)."""
    if not do_sample:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        unlikely = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(unlikely, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def _check(
    temperature: float, top_k: int | None, top_p: float | None, max_new_tokens: int | None, max_length: int | None
) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected above 0; do_sample=False takes the likeliest")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: expected at least 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: expected a share above 0 and at most 1, or None")
    if max_new_tokens is not None and max_length is not None:
        raise ValueError("max_new_tokens and max_length exclude each other")
