"""config.json's keys of layers that differ: which have a sliding window, and rotary positions of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families.common import MAX_PERIOD, read_rope, shortest_period, write_rope
from jaxlm.spec import DecoderSpec, RopeSpec

SLIDING, FULL = "sliding_attention", "full_attention"


def read_windows(config: dict[str, Any], default: Sequence[bool]) -> list[int | None]:
    """The sliding window of each layer; None where a layer sees everything.

    Args:
        default: which layers have one when there is no `layer_types`.

    Raises:
        UserError: `layer_types` is not a list of one known type for each layer, or `sliding_window` is missing.
    """
    types, window = config.get("layer_types"), config.get("sliding_window")
    if types is None:
        types = [SLIDING if slides else FULL for slides in default]
    if not isinstance(types, list) or len(types) != config["num_hidden_layers"]:
        raise UserError(
            f"config.json: layer_types is {types!r}; expected a list of one name for each of the "
            f"{config['num_hidden_layers']} layers"
        )
    unknown = next((kind for kind in types if kind not in (SLIDING, FULL)), None)
    if unknown is not None:
        raise UserError(f"config.json: layer_types has {unknown!r}, which is not supported; known: {SLIDING}, {FULL}")
    if SLIDING in types and window is None:
        raise UserError(f"config.json: layer_types has {SLIDING!r}, but sliding_window is null; expected its length")
    return [window if kind == SLIDING else None for kind in types]


def write_windows(spec: DecoderSpec) -> dict[str, Any]:
    """The keys that `read_windows` reads; layers with different windows have no key."""
    windows = [layer.attention.window for layer in spec.layers()]
    return {
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "sliding_window": next((window for window in windows if window is not None), None),
    }


def read_ropes(config: dict[str, Any], theta: float, local_theta: float) -> dict[int | None, RopeSpec]:
    """The rotary positions of layers by their window, where those with a sliding window have others.

    `rope_scaling`, which belongs to the others alone, is added to what `rope_parameters` says of them, as in
    transformers.

    Args:
        config: its sliding window is the key of the layers that have one.
        theta, local_theta: of layers without and with a window, where `rope_parameters` does not say it.

    Raises:
        UserError: as `read_rope`, and for `rope_parameters` that are not by type of layer.
    """
    given = config.get("rope_parameters")
    for key, value in (("rope_parameters", given), ("rope_scaling", config.get("rope_scaling"))):
        if value is not None and not isinstance(value, dict):
            raise UserError(f"config.json: {key} is {value!r}; expected a JSON object")
    given = dict(given or {})
    if not given.keys() <= {SLIDING, FULL}:
        raise UserError(
            f"config.json: rope_parameters has the keys {', '.join(map(str, given))}; expected an object for each type "
            f"of layer, {FULL} and {SLIDING}"
        )
    ropes: dict[int | None, RopeSpec] = {}
    for kind, own_theta in ((FULL, theta), (SLIDING, local_theta)):
        own = given.get(kind)
        if own is not None and not isinstance(own, dict):
            raise UserError(f"config.json: rope_parameters.{kind} is {own!r}; expected a JSON object")
        own = {"rope_theta": own_theta, **(own or {}), **((config.get("rope_scaling") or {}) if kind == FULL else {})}
        window = None if kind == FULL else config.get("sliding_window")
        rope = read_rope({"rope_parameters": own, "max_position_embeddings": config["max_position_embeddings"]})
        ropes.setdefault(window, rope)
    return ropes


def write_ropes(spec: DecoderSpec, local_theta_key: str | None = None) -> dict[str, Any]:
    """The keys that `read_ropes` reads, for old and new transformers.

    Args:
        local_theta_key: the old key of the theta of layers with a window, where there was one.
    """
    ropes = {layer.attention.window is not None: layer.attention.rotary for layer in spec.layers()}
    full, local = ropes.get(False, ropes.get(True)), ropes.get(True, ropes.get(False))
    assert full is not None and local is not None, "a model has layers"
    scaling = {key: value for key, value in write_rope(full).items() if key != "rope_theta"}
    old = {
        "rope_theta": full.rope_theta,
        "rope_scaling": None if full.rope_type == "default" else scaling,
        **({} if local_theta_key is None else {local_theta_key: local.rope_theta}),
    }
    return {"rope_parameters": {FULL: write_rope(full), SLIDING: write_rope(local)}, **old}


def read_switched_windows(config: dict[str, Any]) -> list[int | None]:
    """Qwen's sliding windows: every config names one, another key switches it on, for the layers from some layer on.

    Raises:
        UserError: as `read_windows`, and when layers differ without a short period, as they do in a long model whose
            last layers alone have a window.
    """
    num_layers, first = config["num_hidden_layers"], config.get("max_window_layers")
    if not config.get("use_sliding_window", False) or config.get("sliding_window") is None:
        return [None] * num_layers
    if config.get("layer_types") is None and type(first) is not int:
        raise UserError(f"config.json: max_window_layers is {first!r}; expected a whole number")
    windows = read_windows(config, [type(first) is int and layer >= first for layer in range(num_layers)])
    if len(shortest_period(windows)) > MAX_PERIOD:
        raise UserError(
            f"config.json: a sliding window on {num_layers - windows.count(None)} of {num_layers} layers, in no "
            f"pattern that repeats every {MAX_PERIOD} layers or less, is not supported; where rows are shorter than "
            f"the window, {config['sliding_window']}, it changes nothing: set use_sliding_window to false"
        )
    return windows


def write_switched_windows(spec: DecoderSpec) -> dict[str, Any]:
    """The keys that `read_switched_windows` reads."""
    keys = write_windows(spec)
    types, window = keys.pop("layer_types"), keys["sliding_window"]
    return {
        "use_sliding_window": window is not None,
        **keys,
        "max_window_layers": 0 if window is not None else spec.num_layers,
        **({"layer_types": types} if len(set(types)) > 1 else {}),
    }
