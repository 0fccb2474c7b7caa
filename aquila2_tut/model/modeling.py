"""The whole model: embedding, decoder layers, final norm, head; a transformers model in every respect."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..chat.generate import PredictMixin
from ..config import Aquila2Config
from .attention import Mask
from .cache import make_cache
from .documents import Documents
from .errors import ModelError
from .layers import DecoderLayer, RMSNorm, linear, packed_for_decoding
from .rope import rotary_tables

HeadLoss = Callable[[nn.Module, Tensor, Tensor, "int | Tensor | None"], Tensor]


class Aquila2PreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, save, initialise and spread an Aquila2 model."""

    config_class = Aquila2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True


def default_positions(attention_mask: Tensor | None, batch: int, past: int, new: int, device: torch.device) -> Tensor:
    """Positions of the new tokens when the caller gives none: they count real tokens, so left padding shifts nothing.

    Args:
        attention_mask: (B, past + new) or None.

    Returns:
        (B, new) integers.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(past, past + new, device=device).expand(batch, new)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past : past + new]


def packed_positions(document_ids: Tensor) -> Tensor:
    """Positions that start anew with every document.

    Args:
        document_ids: (B, S).

    Returns:
        (B, S) integers.
    """
    places = torch.arange(document_ids.shape[1], device=document_ids.device)
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
    return places - (places * begins).cummax(-1).values


def token_documents(attention_mask: Tensor | None, document_ids: Tensor | None, past: int, new: int) -> Tensor | None:
    """One number a token, from the padding mask and the documents: 0 at padding.

    Args:
        attention_mask, document_ids: None or (B, past + new).
        past, new: tokens cached before this call, and tokens of this call.

    Returns:
        (B, past + new) integers, or None where neither is given.

    Raises:
        ModelError: one of them does not cover the cached and the new tokens.
    """
    for name, ids in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        if ids is not None and (ids.ndim != 2 or ids.shape[1] != past + new):
            raise ModelError(
                f"{name} covers {ids.shape[-1]} tokens; {past} are cached and {new} are new, "
                f"so it must cover {past + new}"
            )
    if attention_mask is None or document_ids is None:
        return document_ids if attention_mask is None else attention_mask.bool()
    return document_ids * attention_mask.bool()


def visible_keys(
    attention_mask: Tensor | None, document_ids: Tensor | None, past: int, new: int, keys: int, like: Tensor
) -> Mask:
    """The mask for the attention function: None where plain causality is all there is.

    Args:
        attention_mask: None, (B, past + new) padding mask, or a ready (B, 1, T, S) mask.
        document_ids: None or (B, past + new).
        past, new: tokens cached before this call, and tokens of this call.
        keys: S, how many keys the cache will give; more than past + new with a static cache.
        like: gives B and the device.

    Raises:
        ModelError: see `token_documents`; or documents beside a ready mask, which has to separate them itself.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        if document_ids is not None:
            raise ModelError("give document_ids or a ready (B, 1, T, S) attention_mask, not both")
        return attention_mask
    ids = token_documents(attention_mask, document_ids, past, new)
    if ids is None and keys == past + new:
        return None
    if ids is None:
        ids = like.new_ones(like.shape[0], past + new, dtype=torch.int)
    alone = keys == past + new and bool(((ids == ids[:, :1]) & (ids > 0)).all())
    return None if alone else Documents.of_tokens(ids, new)


class Aquila2Model(Aquila2PreTrainedModel):
    """The decoder without its head: token ids in, hidden states out."""

    def __init__(self, config: Aquila2Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        document_ids: Tensor | None = None,
        rotary_length: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds` (B, T, C) in their place.
            attention_mask: (B, S) with zeros at padding, left or right, covering cached and new tokens; or a ready
                (B, 1, T, S) mask.
            position_ids: (B, T); counted from the mask, or from each document's start, when not given.
            past_key_values: cache of the earlier tokens.
            use_cache: return a cache; the config's `use_cache` when not given, never while training.
            output_attentions, output_hidden_states: also return them, layer by layer.
            document_ids: (B, S), covering cached and new tokens, where a row holds several documents: 1, 2, ... at the
                tokens of each, 0 at padding. A token sees its own document only. (Positions that start anew do not say
                that by themselves.)
            rotary_length: tokens that dynamic scaling makes room for; those up to the last of this call when not
                given. A text that comes in pieces needs it, or each piece is turned for a length of its own.

        Returns:
            last_hidden_state (B, T, C), past_key_values, hidden_states, attentions.

        Raises:
            ModelError: neither or both of `input_ids` and `inputs_embeds`, or a mask or documents that do not fit.
            AttentionError: the backend of the configuration cannot run here.
        """
        x = self._embed(input_ids, inputs_embeds)
        wants = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache = make_cache() if wants and past_key_values is None else past_key_values
        past, keys = 0, x.shape[1]
        if cache is not None:
            past, keys = int(cache.get_seq_length()), cache.get_mask_sizes(x.shape[1], 0)[0]
        mask = visible_keys(attention_mask, document_ids, past, x.shape[1], keys, x)
        if position_ids is None and document_ids is not None:
            position_ids = packed_positions(document_ids)[:, past:]
        elif position_ids is None:
            position_ids = default_positions(attention_mask, x.shape[0], past, x.shape[1], x.device)
        rotary = rotary_tables(self.config, position_ids, x.dtype, rotary_length)
        states, weights = [x], []
        for layer in self.layers:
            x, weight = layer(x, rotary, mask=mask, past_key_values=cache, want_weights=bool(output_attentions))
            if output_hidden_states:
                states.append(x)
            weights.append(weight)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache if wants else None,
            hidden_states=(*states[:-1], x) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelError("give exactly one of input_ids and inputs_embeds")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds


class Aquila2ForCausalLM(Aquila2PreTrainedModel, PredictMixin, GenerationMixin):
    """Aquila2 with its language-model head, and the `predict` and `stream` of the original.

    Args:
        config: the model's shape.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    aquila_name: str | None = None

    def __init__(self, config: Aquila2Config) -> None:
        super().__init__(config)
        self.model = Aquila2Model(config)
        self.lm_head = linear(config, config.hidden_size, config.vocab_size)
        self.post_init()

    def new_cache(self, stored: str | torch.dtype | None = None, length: int = 0) -> Cache:
        """An empty cache for this model, see `aquila2_tut.model.cache.make_cache`."""
        return make_cache(stored, length)

    def decoding(self) -> AbstractContextManager[None]:
        """What `predict` and `stream` wrap an answer in, see `packed_for_decoding`."""
        return packed_for_decoding(self)

    def _prefill(
        self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> CausalLMOutputWithPast:
        # transformers' generate(prefill_chunk_size=...) comes here: dynamic scaling has to know the whole length.
        if generation_config.prefill_chunk_size is not None:
            mask = model_kwargs.get("attention_mask")
            length = input_ids.shape[1] if mask is None else int(mask.sum(-1).max())
            model_kwargs = {**model_kwargs, "rotary_length": length}
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        head_loss: HeadLoss | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Scores the next token at every position.

        Args:
            labels: (B, T) token ids, -100 where there is no loss; they are shifted here.
            logits_to_keep: score only the last so many positions (0: all), or those of the given indices.
            document_ids: as in `Aquila2Model.forward`. The loss does not look at them: set the label of each
                document's first token to -100, or it is predicted from the document before.
            head_loss: computes the loss from the head, hidden (N, C), labels (N,) and `num_items_in_batch`. No logits
                are made then, and they come back as None. See `aquila2_tut.train.loss`.
            kwargs: what `Aquila2Model.forward` takes besides, and `num_items_in_batch` for the loss.

        Returns:
            loss (a mean, in nats per token), logits (B, T or kept, V), past_key_values, hidden_states, attentions.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            return_dict=True,
            document_ids=document_ids,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = out.last_hidden_state if isinstance(keep, int) else out.last_hidden_state[:, keep]
        if labels is not None and head_loss is not None:
            shifted = F.pad(labels[:, 1:], (0, 1), value=-100).flatten().to(hidden.device)
            loss = head_loss(self.lm_head, hidden.flatten(0, 1), shifted, kwargs.get("num_items_in_batch"))
            return CausalLMOutputWithPast(loss=loss)
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


AutoModel.register(Aquila2Config, Aquila2Model, exist_ok=True)
AutoModelForCausalLM.register(Aquila2Config, Aquila2ForCausalLM, exist_ok=True)
