"""What is measured of a model: accuracy, where its q and k are large, what training moved, work."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from longact.inspection import KINDS, Inspection, Kind, inspect_model
from longact.selection import SelectionConfig
from longact.tasks import recall_reward

__all__ = [
    "Work",
    "accuracy",
    "concentration",
    "look",
    "moved",
    "overlap",
    "trained_weights",
]


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: Any, dataset: Dataset, completion: int, batch: int = 16
) -> float:
    """Share of the prompts that greedy decoding answers in full, by `recall_reward`."""
    model.eval()
    right = 0
    for start in range(0, len(dataset), batch):
        rows = dataset[start : start + batch]
        inputs = tokenizer(
            rows["prompt"], return_tensors="pt", padding=True, return_token_type_ids=False
        ).to(model.device)
        said = model.generate(**inputs, max_new_tokens=completion, do_sample=False)
        texts = tokenizer.batch_decode(
            said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(reward == 1 for reward in recall_reward(texts, rows["answers"]))
    return right / len(dataset)


def look(model: PreTrainedModel, tokenizer: Any, prompts: Iterable[str]) -> Inspection:
    """Which channels of q, k and v are large, over these prompts."""
    texts = {str(i): tokenizer(prompt)["input_ids"] for i, prompt in enumerate(prompts)}
    return inspect_model(
        model, {name: torch.tensor(ids, device=model.device) for name, ids in texts.items()}
    )


def concentration(inspection: Inspection) -> dict[Kind, dict[str, float]]:
    """Of q, k and v, means over the layers: what the top 30 % of the channels carry of the summed
    |activation|, and how many times the median the largest is."""
    measures = {
        "top_share": lambda channels: channels.top_share(0.3),
        "largest_over_median": lambda channels: channels.largest_over_median,
    }
    return {
        kind: {name: inspection.mean(kind, measure) or 0.0 for name, measure in measures.items()}
        for kind in KINDS
    }


def overlap(one: Inspection, other: Inspection, kind: Kind) -> float:
    """Share of the selected rows that both have, mean over the layers."""
    pairs = zip(one.of(kind), other.of(kind), strict=True)
    return statistics.fmean(_shared(a.rows, b.rows) for a, b in pairs)


def _shared(one: Tensor, other: Tensor) -> float:
    return float(torch.isin(one, other).float().mean())


def moved(
    before: Mapping[str, Tensor], model: PreTrainedModel, inspection: Inspection
) -> dict[Kind, dict[str, Any]]:
    """Of q, k and v: which rows a run moved most, and whether they were salient before.

    Args:
        before: the parameters as the run found them, by name.
        model: as the run left it.
        inspection: of the model as the run found it.

    Returns:
        For each kind `overlap`, for each layer the share of the rows that moved most (by the norm
        of their change, as many as are salient) that are salient; `head_overlap`, the same for each
        head; and `bf16_changed`, the share of the weights that are others when rounded to bf16.
    """
    after = {name: param.detach() for name, param in model.named_parameters()}
    result: dict[Kind, dict[str, Any]] = {}
    for kind in KINDS:
        overlaps, heads, changed = [], [], []
        for name, layer in inspection.layers.items():
            weight = f"{name}.{kind}_proj.weight"
            change = (after[weight] - before[weight]).norm(dim=1).cpu()
            overlaps.append(_moved_overlap(change, layer[kind].magnitude.cpu()))
            heads.append(
                [
                    _moved_overlap(*pair)
                    for pair in zip(
                        change.chunk(layer[kind].heads),
                        layer[kind].magnitude.cpu().chunk(layer[kind].heads),
                        strict=True,
                    )
                ]
            )
            rounded = after[weight].bfloat16() != before[weight].bfloat16()
            changed.append(rounded.float().mean().item())
        result[kind] = {
            "overlap": overlaps,
            "head_overlap": heads,
            "bf16_changed": statistics.fmean(changed),
        }
    return result


def _moved_overlap(change: Tensor, magnitude: Tensor) -> float:
    k = SelectionConfig().count(len(change))
    return _shared(change.topk(k).indices, magnitude.topk(k).indices)


class Work:
    """Counts, as a context, what a model computes in its forwards, and says what that costs.

    Forwards with gradients enabled are taken to be followed by a backward.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.tokens = {"forward": 0, "backward": 0}
        self._pairs = {"forward": 0.0, "backward": 0.0}  # of tokens that attend to each other

    def __enter__(self) -> Work:
        decoder = self._model.base_model
        self._hook = decoder.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hook.remove()

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # until transformers 5.23
        past = 0 if cache is None else int(cache.get_seq_length())
        for what in ("forward", "backward") if torch.is_grad_enabled() else ("forward",):
            self.tokens[what] += ids.numel()
            self._pairs[what] += ids.numel() * (past + ids.shape[1] / 2)

    def flops(self, trained: int) -> float:
        """Of the decoder's matrix products (not the output embedding's), 2 for a multiply-add.

        Args:
            trained: weights of its linear layers that get a gradient.
        """
        layers = [m for m in self._model.base_model.modules() if isinstance(m, nn.Linear)]
        weights = sum(layer.weight.numel() for layer in layers)
        config = self._model.config
        width: int = config.num_hidden_layers * config.num_attention_heads * config.head_dim

        def products(what: str) -> float:
            """With scores and mixed values: two products of a head's size for each pair."""
            return 2.0 * weights * self.tokens[what] + 4 * width * self._pairs[what]

        # A backward does a forward's products for the inputs, and has both sides of attention.
        gradients = 2.0 * trained * self.tokens["backward"] + 4 * width * self._pairs["backward"]
        return products("forward") + products("backward") + gradients


def trained_weights(model: PreTrainedModel, rows: Mapping[str, Tensor | None]) -> int:
    """Weights of the decoder's linear layers that get a gradient at a step, where of the layers in
    `rows` only these do."""
    count = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or layer is model.get_output_embeddings():
            continue
        selected = rows.get(name)
        if selected is not None:
            count += selected.numel() * layer.in_features
        elif layer.weight.requires_grad:
            count += layer.weight.numel()
    return count
