"""BLIP3o-NEXT's text stage (arXiv 2510.15857): a language model draws an image's tokens for a caption, reads the whole
row, and a connector turns its states of those tokens into what the transformer attends to.

`emf export` puts this file beside the weights, and diffusers runs it where it is told trust_remote_code=True.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class EMFConnector(ModelMixin, ConfigMixin):
    """Linear, GELU(tanh), Linear, RMSNorm on states [B, M, hidden], and what makes those states of captions."""

    config_name: Any = "config.json"

    @register_to_config
    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(hidden, channels), nn.Linear(channels, channels)
        self.norm = nn.RMSNorm(channels, eps=1e-5)

    def forward(self, states: Tensor) -> Tensor:
        """States [B, M, channels], all of which are attended to; of no caption those of zeros."""
        hidden = nn.functional.gelu(self.linear_1(states.to(self.dtype)), approximate="tanh")
        connected: Tensor = self.norm(self.linear_2(hidden))
        return connected

    @staticmethod
    def read(model: Any, tokenizer: Any, prompts: list[str], seeds: list[int], *, told: dict[str, Any]) -> Tensor:
        """States [B, M, hidden] of captions, one at a time.

        model: Qwen3ForCausalLM. seeds: of the image tokens. told: `settings` of the folder's model_index.json.
        """
        count, found = 1 + told["tokens"], []
        for prompt, seed in zip(prompts, seeds, strict=True):
            ids = row(model, tokenizer, prompt, seed, told)
            end = len(ids) - (len(told["tail"]) if told["window"] == "inference" else 0)
            out = model(input_ids=tensor(ids, model), use_cache=False, output_hidden_states=True, logits_to_keep=1)
            found.append(out.hidden_states[-1][:, end - count : end])
        return torch.cat(found)


def row(model: Any, tokenizer: Any, prompt: str, seed: int, told: dict[str, Any]) -> list[int]:
    """Ids of a chat that asks for a caption, of image tokens drawn by top-k and top-p, and of what ends such a row."""
    turns = [{"role": "system", "content": told["system"]}]
    turns += [{"role": "user", "content": told["request"].format(prompt)}]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    text += "<|im_start|>assistant\n"
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *told["head"]]
    fed, past = ids, None
    for x in torch.rand(told["tokens"], generator=torch.Generator().manual_seed(seed)).tolist():
        out = model(input_ids=tensor(fed, model), past_key_values=past, use_cache=True, logits_to_keep=1)
        past, logits = out.past_key_values, out.logits[0, -1].float()
        values, order = (logits / told["temperature"]).topk(min(told["top_k"], len(logits)))
        p = values.softmax(-1)
        p = torch.where(p.cumsum(-1) - p < told["top_p"], p, 0.0)
        at = min(int(((p / p.sum()).cumsum(-1) <= x).sum()), int((p > 0).sum()) - 1)
        fed = [int(order[at])]
        ids += fed
    return ids + told["tail"]


def tensor(ids: list[int], model: Any) -> Tensor:
    return torch.tensor([ids], device=model.device)
