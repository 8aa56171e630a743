"""The arms: what each of them trains, and how its rows are chosen.

LongAct's own arms use the package as a user would. Controls have rows that the package never
chooses; `Control` sets them by hand, at the same moments as `refresh_every=1` would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from longact import LongAct
from longact.integrations.transformers import apply_to_trainer
from longact.optim import FusedMaskedAdam
from longact.selection import SelectionConfig

__all__ = ["ARMS", "Arm", "check", "start"]

#: "random" is drawn once, "redrawn" at each step.
Rule = Literal["salient", "lowest", "random", "redrawn"]


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    says: str
    apply: Mapping[str, Any] | None = None  # arguments of longact.apply; None: an ordinary run
    rule: Rule = "salient"
    optimizer: Mapping[str, Any] = field(default_factory=dict)  # options of FusedMaskedAdam
    frozen: tuple[str, ...] = ()  # modules whose parameters are not trained


def _sparse(**arguments: Any) -> dict[str, Any]:
    return {"others": "freeze", **arguments}


V = {"targets": ["v_proj"]}
ARMS: Mapping[str, Arm] = {
    # All other parameters are trained: the paper's setting, and its controls.
    "full": Arm("all parameters, AdamW"),
    "longact": Arm("the top 30 % of the rows of q and k, all else as usual", {}),
    "random": Arm("30 % of the rows of q and k at random, drawn once", {}, "random"),
    "redrawn": Arm("30 % of the rows of q and k at random, drawn at each step", {}, "redrawn"),
    "lowest": Arm("the 30 % of the rows of q and k with the lowest magnitude", {}, "lowest"),
    "v": Arm("the top 30 % of the rows of v, all else as usual", V),
    "q only": Arm("the top 30 % of the rows of q, all else as usual", {"targets": ["q_proj"]}),
    "k only": Arm("the top 30 % of the rows of k, all else as usual", {"targets": ["k_proj"]}),
    "no q k": Arm("no row of q and k, all else as usual", frozen=("q_proj", "k_proj")),
    # Nothing else is trained: here the rows must carry it all.
    "sparse all": Arm("all rows of q and k, nothing else", _sparse(keep_ratio=1.0)),
    "sparse": Arm("the top 30 % of the rows of q and k, nothing else", _sparse()),
    "sparse random": Arm("30 % of q and k at random, nothing else", _sparse(), "random"),
    "sparse lowest": Arm("the lowest 30 % of q and k, nothing else", _sparse(), "lowest"),
    "sparse v": Arm("the top 30 % of the rows of v, nothing else", _sparse(**V)),
    # Options of the package.
    "keep 0.1": Arm("keep_ratio=0.1", {"keep_ratio": 0.1}),
    "keep 0.5": Arm("keep_ratio=0.5", {"keep_ratio": 0.5}),
    "zero_grad": Arm("inactive='zero_grad'", {}, optimizer={"inactive": "zero_grad"}),
    "once": Arm("refresh_every=0", {"refresh_every": 0}),
    "forward": Arm("refresh_every='forward'", {"refresh_every": "forward"}),
    "head": Arm("scope='head'", {"scope": "head"}),
    "model": Arm("scope='model'", {"scope": "model"}),
    "norm": Arm("capture='norm'", {"capture": "norm"}),
    "rope": Arm("capture='rope'", {"capture": "rope"}),
    "pairs": Arm("pair_rope=True", {"pair_rope": True}),
    "sparse keep 0.1": Arm("others='freeze', keep_ratio=0.1", _sparse(keep_ratio=0.1)),
    "sparse keep 0.5": Arm("others='freeze', keep_ratio=0.5", _sparse(keep_ratio=0.5)),
    "sparse once": Arm("others='freeze', refresh_every=0", _sparse(refresh_every=0)),
    "sparse head": Arm("others='freeze', scope='head'", _sparse(scope="head")),
    "sparse norm": Arm("others='freeze', capture='norm'", _sparse(capture="norm")),
    "sparse rope": Arm("others='freeze', capture='rope'", _sparse(capture="rope")),
    "sparse pairs": Arm("others='freeze', pair_rope=True", _sparse(pair_rope=True)),
}


def start(
    trainer: Trainer, name: str, calibration: Mapping[str, Tensor], seed: int
) -> LongAct | None:
    """Has the trainer train as the arm does. Call it once, before `trainer.train()`.

    `calibration`: inputs of the model, from which a control chooses its first rows.
    """
    arm = ARMS[name]
    for module, layer in trainer.model.named_modules():
        if module.rpartition(".")[2] in arm.frozen:
            layer.requires_grad_(False)
    if arm.apply is None:
        cls, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        assert cls is torch.optim.AdamW
        # The kernel of the other arms, so that these differ in their rows alone.
        trainer.optimizer_cls_and_kwargs = FusedMaskedAdam, options
        return None
    if arm.rule == "salient":
        return apply_to_trainer(trainer, optimizer=arm.optimizer, **arm.apply)
    handle = apply_to_trainer(trainer, optimizer=arm.optimizer, **arm.apply, refresh_every=0)
    control = Control(handle, arm.rule, seed)
    trainer.model.train()
    trainer.model(**calibration)
    control.choose()
    trainer.add_callback(control)
    return handle


def check(
    name: str,
    before: Mapping[str, Tensor],
    model: nn.Module,
    rows: Mapping[str, Tensor | None],
    activation_share: Sequence[float] | None,
) -> None:
    """Whether a run trained what its arm says, and by its rule.

    Args:
        name: the arm's.
        before: the parameters as the run found them, by name.
        model: as the run left it.
        rows: of each projection with a selection those that the last step trained, or that the next
            one would.
        activation_share: of each step, the part of the summed |activation| in the rows it trained.

    Raises:
        RuntimeError: it did not.
    """
    arm = ARMS[name]
    options = dict(arm.apply or {})
    is_sparse = options.get("others") == "freeze"
    is_fixed = arm.rule == "random" or options.get("refresh_every") == 0

    def broken(what: str) -> RuntimeError:
        return RuntimeError(f"the arm {name!r} is broken: {what}")

    for key, param in model.named_parameters():
        module = key.rpartition(".")[0]
        changed = param.detach() != before[key]
        is_frozen = module.rpartition(".")[2] in arm.frozen or (is_sparse and module not in rows)
        if is_frozen and changed.any():
            raise broken(f"{key} was trained")
        if module in rows and not changed.any():
            raise broken(f"{key} was not trained")
        selected = rows.get(module)
        if is_fixed and selected is not None:
            found = changed.reshape(len(changed), -1).any(1).nonzero().squeeze(1)
            if found.tolist() != selected.tolist():
                raise broken(f"other rows of {key} changed than those that were chosen at first")
    if activation_share is None:
        return
    options.pop("targets", None)
    # Of the first step: rows change their rank as they are trained. At random, with one seed, rows
    # come within a few per cent of `keep`.
    share, keep = activation_share[0], SelectionConfig(**options).keep_ratio
    expected = {
        "salient": share > 1.1 * keep or keep == 1,
        "lowest": share < 0.9 * keep,
        "random": abs(share - keep) < keep / 3,
        "redrawn": abs(share - keep) < keep / 3,
    }
    if not expected[arm.rule]:
        raise broken(f"{keep:.0%} of the rows, {arm.rule}, had {share:.0%} of the activation")


class Control(TrainerCallback):  # type: ignore[misc]
    """Chooses rows by another rule than the package, as many, at the same moments."""

    def __init__(self, handle: LongAct, rule: Rule, seed: int) -> None:
        self._handle, self._rule = handle, rule
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self) -> None:
        """Of each projection, from what was counted since the last time."""
        counted = self._handle.state_dict()["projections"]
        rows = {name: self._rows(entry["magnitude"]) for name, entry in counted.items()}
        self._handle.refresh()  # begins to count afresh, and ends a choice that is provisional
        state = self._handle.state_dict()
        for name, entry in state["projections"].items():
            entry["rows"] = rows[name]
        self._handle.load_state_dict(state)

    def _rows(self, magnitude: Tensor) -> Tensor:
        score = magnitude
        if self._rule != "lowest":
            score = torch.rand(magnitude.shape, generator=self._generator).to(magnitude.device)
        chosen = score.argsort(stable=True)[: self._handle.config.count(len(score))]
        return chosen.sort().values.int()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._rule != "random":
            self.choose()
