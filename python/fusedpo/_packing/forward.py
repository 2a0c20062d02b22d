"""A packed row through a model's backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .architectures import windowed_layers
from .attention import packed_arguments
from .layout import Packed
from .table import SegmentTable


def packed_states(
    backbone: Any, packed: Packed, config: Any, **keywords: Any
) -> tuple[Any, Tensor]:
    """Run a backbone on a packed row; return its output, and the hidden states [S, H] that score
    the S tokens. `config` is the model's, which tells its layers.

    Raises:
        RuntimeError: a layer did not hand the layout to its attention, so that completions have
            seen each other; or kept its sliding window to a mask, which packed rows do not have.
    """
    table = segment_table(packed)
    ids = packed.input_ids
    states = backbone(
        input_ids=ids,
        position_ids=packed.position_ids,
        **packed_arguments(table, ids.device),
        **keywords,
    )
    _check_received(table, backbone, config)
    hidden = states.last_hidden_state
    # A prompt's last state is taken once for each completion. Backward adds what comes back for it;
    # of two addends the order does not matter.
    return states, hidden[0].index_select(0, packed.rows.to(hidden.device))


# torch.compile must not look into either: it would compile anew for every layout.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def segment_table(packed: Packed) -> SegmentTable:
    return SegmentTable(packed.segments)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _check_received(table: SegmentTable, backbone: Any, config: Any) -> None:
    layers, windows = config.num_hidden_layers, windowed_layers(config)
    if table.calls < layers:
        problem = f"{table.calls} of {layers} layers received the layout of a packed row"
    elif table.windowed != windows:
        problem = f"{table.windowed} of {windows} layers with a sliding window told it"
    else:
        return
    raise RuntimeError(
        f"{type(backbone).__name__}: {problem}. Pass share_prompts=False, and report the model and "
        "the version of transformers."
    )


def repeated(router_logits: Sequence[Tensor], packed: Packed) -> tuple[Tensor, ...]:
    """Router logits [N, experts] of each layer as padded rows would have them without padding:
    a prompt's tokens count once for each of its completions."""
    index = packed.repeated().to(router_logits[0].device, non_blocking=True)
    return tuple(logits.index_select(0, index.to(logits.device)) for logits in router_logits)
