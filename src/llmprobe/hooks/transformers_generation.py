"""One running ``generate`` call: what is known about its batch, its tokens and its step, on the host.

A *row* is a sequence that the device works on (beams and several returned sequences are rows of their own);
a *request* is a row of the batch that the caller passed. A request's generated tokens are those of all the
sequences returned for it.
"""

from __future__ import annotations

from typing import Any

from llmprobe.hooks.transformers_cache import CacheSize
from llmprobe.record.clock import Stamps

REQUEST = "request"  #: the outermost call of a thread
DRAFT = "draft"  #: the assistant's call inside assisted decoding
NESTED = "nested"  #: any other call inside a call, such as one made by a streamer


class Generation:
    """State of one call; lives on its thread's stack, never on the model."""

    # Forty values and more: in a dictionary, which each look-up has to go through, they would lie far apart.
    __slots__ = (
        "assisted",
        "boundaries",
        "busy",
        "cache",
        "cached",
        "candidates",
        "context",
        "cross_length",
        "eos",
        "forwarded",
        "generation",
        "groups",
        "keep",
        "kind",
        "kv_size",
        "kv_walks",
        "live",
        "looping",
        "model",
        "new_tokens",
        "number",
        "own_ns",
        "own_request_ns",
        "pad",
        "parent",
        "past",
        "phase",
        "prompts",
        "provisional",
        "query",
        "requests",
        "rows",
        "sequence_start",
        "stale",
        "stamps",
        "started",
        "step_rows",
        "step_time",
        "token_times",
        "tokens_written",
        "unprepared",
        "use_cache",
    )

    def __init__(
        self, kind: str, model: Any, parent: Generation | None, started: int, generation: int
    ) -> None:
        self.kind = kind
        self.model = model
        self.parent = parent
        self.started = started  # CLOCK_MONOTONIC nanoseconds
        self.generation = generation  # of the probe, see `Probe.generation`
        self.stale = False  # the probe was off for a part of this call
        # The batch.
        self.requests = 1
        self.rows = 1
        self.prompts: list[int] = [0]  # prompt tokens of each request
        self.sequence_start = 0  # tokens at the head of the returned sequences that are not new
        self.cached = 0  # prompt tokens a request found in the cache
        self.cross_length = 0  # encoder tokens a row
        self.groups: tuple[tuple[str, int | None], ...] = ()
        self.eos: frozenset[int] = frozenset()
        self.pad: int | None = None
        self.use_cache = True
        self.assisted = False
        #: Whether each boundary is one more token for every request (else known only from the result).
        self.live = False
        # Where the call is.
        self.looping = False  # inside one of the decoding loops
        self.busy = False  # inside prepare_inputs_for_generation, which may call its base class's
        self.unprepared = False  # prepare_inputs_for_generation may be bypassed: steps start at boundaries
        self.boundaries = 0
        self.token_times: list[int] = []  # when each generated token was there
        self.new_tokens = 0  # a row, since the last boundary
        self.past = 0  # tokens a row has in the cache
        # The open step.
        self.stamps: Stamps | None = None
        self.forwarded = False  # its forward is over
        self.provisional = False  # opened at a boundary; prepare may still correct it
        self.number = 0
        self.phase = 0
        self.step_time = 0
        self.step_rows = 0
        self.query = 0
        self.keep = 0  # positions a row that go through the output head
        self.candidates = 0  # of the query, drafted tokens
        self.context = 0
        # The cache.
        self.cache: Any = None
        self.kv_size: CacheSize | None = None
        self.kv_walks = 0
        self.tokens_written = 0  # of `token_times`, those in the journal
        # llmprobe's own time.
        self.own_ns = 0
        self.own_request_ns = 0

    def read_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Batch and prompt as the caller passed them to ``generate``."""
        inputs: Any = args[0] if args else None
        for name in (
            "inputs",
            "input_ids",
            "inputs_embeds",
            "input_features",
            "input_values",
            "pixel_values",
        ):
            if inputs is None:
                inputs = kwargs.get(name)
        if not hasattr(inputs, "shape") or len(inputs.shape) < 2:
            return
        self.requests = self.rows = int(inputs.shape[0])
        embedded = kwargs.get("inputs_embeds")
        if len(inputs.shape) == 2 and not inputs.is_floating_point():
            length = int((embedded if embedded is not None else inputs).shape[1])
        else:
            length = int(embedded.shape[1]) if embedded is not None else 0
        mask = kwargs.get("attention_mask")
        if (
            mask is not None
            and mask.device.type == "cpu"
            and len(mask.shape) == 2
            and mask.shape == (self.requests, length)
        ):
            # Without the padding. On a GPU, reading the mask would synchronise.
            self.prompts = [int(count) for count in mask.sum(1).tolist()]
        else:
            self.prompts = [length] * self.requests

    def read_loop(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the decoding loop was given: the batch as the device will see it."""
        self.looping = True
        self.assisted = name == "_assisted_decoding"
        input_ids = args[0] if args else kwargs.get("input_ids")
        config = kwargs.get("generation_config")
        if input_ids is not None and len(input_ids.shape) >= 2:
            self.rows, self.sequence_start = int(input_ids.shape[0]), int(input_ids.shape[1])
        if not any(self.prompts):  # neither text nor embeddings: what the loop continues is the prompt
            self.prompts = [self.sequence_start] * self.requests
        self.use_cache = bool(kwargs.get("use_cache", True))
        self.eos = _token_set(getattr(config, "eos_token_id", None))
        pad = getattr(config, "pad_token_id", None)
        self.pad = pad if isinstance(pad, int) else None
        self.live = self.rows == 1 or (self.rows == self.requests and not self.eos)
        encoded = kwargs.get("encoder_outputs")
        if encoded is not None:
            states = encoded[0]
            self.cross_length = int(states.shape[1]) if hasattr(states, "shape") else 0

    def returned_tokens(self, result: Any) -> tuple[list[int], list[int]]:
        """(sum, longest) of the new tokens of each request, in what ``generate`` returned.

        A row that ended early is padded; where its end can be read without synchronising (on the CPU) the
        padding is not counted.
        """
        observed = len(self.token_times)
        sequences = getattr(result, "sequences", result)
        if not hasattr(sequences, "shape") or len(sequences.shape) != 2 or self.live:
            return [observed] * self.requests, [observed] * self.requests
        length = min(max(int(sequences.shape[1]) - self.sequence_start, 0), observed)
        counts = [length] * int(sequences.shape[0])
        if self.eos and sequences.device.type == "cpu":
            rows = sequences[:, self.sequence_start : self.sequence_start + length].tolist()
            counts = [_until_end(row, self.eos, self.pad) for row in rows]
        share = max(len(counts) // self.requests, 1)
        groups = [counts[at : at + share] for at in range(0, share * self.requests, share)]
        return [sum(group) for group in groups], [max(group, default=0) for group in groups]

    @property
    def kv_bytes(self) -> int:
        """Resident bytes of the cache of this call."""
        return self.kv_size.at(self.past) if self.kv_size is not None else 0

    def new_gaps(self) -> tuple[int, dict[int, int]]:
        """Tokens since the last call of this, and the gaps before them, for every request alike.

        As in engines, a step makes one gap, whatever number of tokens a verification accepts at once.
        """
        times, first = self.token_times, self.tokens_written
        count = len(times)  # grows while this runs in the housekeeping thread
        self.tokens_written = count
        gaps: dict[int, int] = {}
        for index in range(max(first, 1), count):
            gap = times[index] - times[index - 1]
            if gap:
                gaps[gap] = gaps.get(gap, 0) + self.requests
        return (count - first) * self.requests, gaps

    def late_gaps(self, longest: list[int]) -> dict[int, int]:
        """Gaps between tokens, by how many requests had each: for requests of ``longest`` tokens."""
        gaps: dict[int, int] = {}
        times = self.token_times
        for index in range(1, min(max(longest, default=0), len(times))):
            gap = times[index] - times[index - 1]
            gaps[gap] = gaps.get(gap, 0) + sum(count > index for count in longest)
        return gaps


def _token_set(value: Any) -> frozenset[int]:
    if isinstance(value, int):
        return frozenset((value,))
    return (
        frozenset(token for token in value if isinstance(token, int))
        if isinstance(value, list)
        else frozenset()
    )


def _until_end(row: list[int], eos: frozenset[int], pad: int | None) -> int:
    """Tokens up to and with the first end-of-sequence token, without trailing padding."""
    for index, token in enumerate(row):
        if token in eos:
            return index + 1
    length = len(row)
    if pad is not None:
        while length and row[length - 1] == pad:
            length -= 1
    return length


def is_assistant(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this call of ``generate`` is that of an assistant in assisted decoding."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    return bool(getattr(config, "is_assistant", False))
